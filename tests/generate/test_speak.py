"""`regard generate` on the command line."""

import pytest
from typer.testing import CliRunner

from regard import RegardError, models
from regard.cli import app
from regard.lab.speak import Printer, speak
from regard.lab.sweep.reader import Bytes

pytest.importorskip("transformers")


def test_text_streams_and_a_line_of_numbers_follows():
    shown = []
    line = speak("tiny", "import os\nimport sys\n", tokens=40, show=shown.append)
    model, ids = models.load("tiny"), models.encode("import os\nimport sys\n")
    truth = models.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :])
    assert "".join(shown) == truth and len(shown) > 1 and line.startswith("40 tokens in ")
    result = CliRunner().invoke(app, ["generate", "tiny", "--prompt", "import os\nimport sys\n", "--tokens", "40", "--draft", "tiny"])
    assert result.exit_code == 0 and result.stdout.startswith(truth)


def test_no_half_characters():
    shown = []
    printer = Printer(Bytes(), shown.append)
    for byte in "aé€b".encode():
        printer(0, [byte])
    assert shown == ["a", "é", "€", "b"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(("tiny", "x", "promptlookup"), "Did you mean"), (("no such folder", "x"), "expected"), (("smollm2-135m", ""), "--prompt is empty")],
)
def test_bad_arguments_are_refused(arguments, why, smollm):
    with pytest.raises(RegardError, match=why):
        speak(*arguments)
