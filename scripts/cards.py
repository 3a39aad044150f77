"""Prints src/regard/catalog/cards.json: what each working system's own code says of it (python scripts/cards.py > ...)."""

import json
import sys

from regard.catalog import names
from regard.lab.card import lines

# Everything is made before anything is printed: the file being written is one that regard reads.
text = json.dumps({name: lines(name) for name in names(None)}, indent=0, ensure_ascii=False)
sys.stdout.write(text + "\n")
