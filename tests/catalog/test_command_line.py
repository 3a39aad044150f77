"""Questions about the catalogue are answered without PyTorch, and so at once."""

import json
import subprocess
import sys

import pytest

ASKED = ([], ["--help"], ["list"], ["list", "--json"], ["show", "softpick"], ["show", "softpick", "--json"], ["show", "no-such-system"])


@pytest.mark.parametrize("arguments", ASKED, ids=" ".join)
def test_no_torch(arguments):
    script = (
        f"import sys, atexit; sys.argv = {['regard', *arguments]!r}\n"
        "atexit.register(lambda: sys.stderr.write(str([n for n in ('torch', 'numpy', 'transformers') if n in sys.modules])))\n"
        "from regard.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.endswith("[]")
    assert done.returncode == (2 if "no-such-system" in arguments else 0)
    if not arguments:
        assert done.stdout.count("  regard ") == 4
    if arguments[:1] == ["show"] and done.returncode == 0:
        text = json.loads(done.stdout)["card"] if "--json" in arguments else done.stdout
        for part in ("relu(exp(s_ij) - 1)", "hyperparameters: (eps: float = 1e-08)", "executors: ", "checked:", "claim: ", "check: "):
            assert part in text
