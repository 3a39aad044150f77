"""The command line: list, show, verify, plan-free comparisons. Bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import RegardError

app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False, rich_markup_mode=None, help="One engine for attention.")
EXAMPLES = """regard: one engine for attention. Try:

  regard compare softmax gla deltanet --minutes 4    which attention learns best here, and what does it cost
  regard show softpick                               the formula, the paper, how it runs, what is checked
  regard list --family linear                        who there is

  regard --help                                      all commands
"""
Family = Annotated[str | None, typer.Option(help="softmax, linear, sparse, systems, vision, generative, multimodal or analysis")]


@app.callback()
def start(context: typer.Context) -> None:
    """One engine for attention."""
    if context.invoked_subcommand is None:
        say(EXAMPLES.rstrip())


@app.command("list")
def list_rows(
    family: Family = None,
    status: Annotated[str | None, typer.Option(help="works or planned")] = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="of the attentive survey: sequences=co, positions=hard, ...; working ones alone")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all fields, as a JSON list")] = False,
) -> None:
    """The systems of the catalogue."""
    from .catalog import records

    found = records(family, status)
    if axis:
        from .catalog.axes import with_axes

        asked = {name: value for name, _, value in (one.partition("=") for one in axis)}
        fitting = set(with_axes(None, asked))
        found = [record for record in found if record.slug in fitting]
    if as_json:
        say(json.dumps([record.as_dict() for record in found]))
        return
    rows = [("id", "name", "family", "year", "status", "what")]
    rows += [(str(r.id), r.slug, r.family, str(r.year), r.status, r.short) for r in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    works = sum(record.status == "works" for record in found)
    say(f"{len(found)} systems: {works} work, {len(found) - works} planned")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a name from `regard list`")],
    as_json: Annotated[bool, typer.Option("--json", help="the record and the card, as JSON")] = False,
) -> None:
    """One system: formula, parts, paper, executors, cost, check."""
    from .catalog.cards import card, record_of

    text = card(name)
    if not as_json:
        say(text)
        return
    record = record_of(name)
    say(json.dumps({"name": name, "card": text, "record": record and record.as_dict()}))


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="rows to verify (default: every working one)")] = None,
    family: Family = None,
    file: Annotated[Path | None, typer.Option("--json", help="also write the results here")] = None,
    whole: Annotated[
        bool, typer.Option("--full", help="theory at its paper's size, which takes minutes to days: numbers, no verdict")
    ] = False,
) -> None:
    """Run the checks of working rows: claim, measured, threshold, control, verdict."""
    if whole:
        from .errors import RegardError
        from .lab.full import FULL, full

        if not names:
            raise RegardError(f"--full without names; expected some of {', '.join(FULL)}")
        for name in names:
            lines = full(name)
            say(f"{name}: {FULL[name].what} (about {FULL[name].hours:g} hours of one core)")
            for told, number in lines:
                say(f"     {told}: {number:.4g}")
        return
    from .lab.files import write_text
    from .lab.verification import report, rows
    from .lab.verification import verify as run

    if family is not None:
        from .catalog import records

        records(family)
    rows(names or [], family)
    done: list[Any] = []
    for record, results in run(names or [], family):
        done.append((record, results))
        for result in results:
            say(f"{'ok  ' if result.passed else 'FAIL'} {record.slug}: {result.claim}")
            detail = f"     measured {result.measured:.4g}, expected {result.threshold}; control {result.control}"
            say(detail + ("" if result.passed else f"; {result.verdict}"))
    summary = report(done, family)
    if file is not None:
        write_text(file, json.dumps(summary, indent=1))
    counts = summary["summary"]
    say(f"{counts['works']} work, {counts['planned']} planned, {counts['failed']} failed")
    if counts["failed"]:
        raise typer.Exit(1)


@app.command()
def compare(
    mechanisms: Annotated[list[str] | None, typer.Argument(help="names, or name:key=value,... (default: six that span the shapes)")] = None,
    text: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the text that ships with Python)")] = None,
    minutes: Annotated[float, typer.Option(help="budget of the whole comparison")] = 4.0,
    seq_len: Annotated[int, typer.Option(help="training length in bytes")] = 128,
    directory: Annotated[Path, typer.Option("--out", help="where report.json and report.html go")] = Path("runs/compare"),
    seed: Annotated[int, typer.Option(help="seed of the first run's models and data")] = 0,
    seeds: Annotated[int, typer.Option(help="runs of each model, where the budget allows")] = 3,
    parallel: Annotated[int | None, typer.Option(help="runs at once (default: one a core)")] = None,
    backend: Annotated[str, typer.Option(help="of joblib: loky, ray or dask")] = "loky",
    resume: Annotated[bool, typer.Option("--resume", help="keep what an interrupted run finished")] = False,
    task: Annotated[
        str, typer.Option(help="text, or of layers of images: digits, occluded-digits, shifted-digits, shapes, textures")
    ] = "text",
    dim: Annotated[int, typer.Option(help="channels of the model on text")] = 64,
    layers: Annotated[int, typer.Option(help="layers of the model on text")] = 2,
    heads: Annotated[int, typer.Option(help="heads of the model on text")] = 2,
    batch: Annotated[int, typer.Option(help="sequences a step on text")] = 8,
    launch: Annotated[str | None, typer.Option(help="torchrun: train each model data-parallel, in processes of this machine")] = None,
    processes: Annotated[int | None, typer.Option(help="of --launch (default: 2); one a GPU where there are some")] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help="of --launch: parameters and optimizer shared among the processes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole report as JSON")] = False,
) -> None:
    """Train the same small model with each mechanism on the same text, or with each layer on the same images, measure all, write a report."""
    from .lab.compare import Config, VisionConfig, compare_layers, default_mechanisms
    from .lab.compare import compare as run

    if launch is None and processes is not None:
        raise RegardError(f"--processes {processes} is of --launch torchrun; leave it out, or see --parallel for runs side by side")
    if launch is None and sharded:
        raise RegardError("--sharded is of --launch torchrun; leave it out, or train with --launch torchrun")
    if launch is not None and (parallel is not None or backend != "loky"):
        raise RegardError(
            "--parallel and --backend run models side by side, --launch one in several processes; expected one of the two ways"
        )
    if task != "text":
        if text is not None or seq_len != 128:
            raise RegardError(f"--text and --seq-len are of the task text; leave them out with --task {task}")
        from .lab.compare.slots import fitting

        if launch is not None or (dim, layers, heads, batch) != (64, 2, 2, 8):
            raise RegardError(f"--launch, --dim, --layers, --heads and --batch are of the task text; leave them out with --task {task}")
        told = VisionConfig(tuple(mechanisms or fitting()), task, minutes, directory, seed, seeds, parallel=parallel, backend=backend)
        answer(*compare_layers(told, resume), directory, as_json)
        return
    config = Config(
        tuple(mechanisms or default_mechanisms()),
        text,
        minutes,
        seq_len,
        directory,
        seed,
        dim,
        layers,
        heads,
        batch,
        seeds=seeds,
        parallel=parallel,
        backend=backend,
    )
    if launch is None:
        answer(*run(config, resume), directory, as_json)
        return
    if launch != "torchrun":
        raise RegardError(f"--launch {launch}: expected torchrun")
    from .lab.compare.launched import launch as start

    if code := start(config, 2 if processes is None else processes, resume, sharded):
        raise typer.Exit(code)
    answer(json.loads((directory / "report.json").read_text(encoding="utf-8")), True, directory, as_json)


def answer(report: dict[str, Any], finished: bool, directory: Path, as_json: bool) -> None:
    """What a comparison says at its end."""
    say(json.dumps(report) if as_json else f"{report['verdict']}\nreport: {directory / 'report.html'}")
    if not finished:
        raise typer.Exit(130)


@app.command()
def choose(
    context: Annotated[str, typer.Option(help="tokens of a prompt: 4096, 32k")] = "4096",
    task: Annotated[str, typer.Option(help="text, long-text or recall")] = "text",
    memory: Annotated[str | None, typer.Option(help="for what layers keep and work with: 512MB, 1GB (default: any)")] = None,
    device: Annotated[str, typer.Option(help="where costs are measured: cpu, cuda")] = "cpu",
    answer: Annotated[int, typer.Option(help="tokens made after the prompt")] = 256,
    dim: Annotated[int, typer.Option(help="channels of the model")] = 512,
    layers: Annotated[int, typer.Option(help="layers of the model")] = 12,
    heads: Annotated[int, typer.Option(help="heads of a layer")] = 8,
    batch: Annotated[int, typer.Option(help="sequences at once")] = 1,
    minutes: Annotated[float, typer.Option(help="for measuring costs; the best by the study come first")] = 2.0,
    among: Annotated[list[str] | None, typer.Option(help="only these mechanisms (may be given several times)")] = None,
    file: Annotated[Path | None, typer.Option("--report", help="also write an HTML page here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Rank mechanisms for a context, a task and a memory: quality from the shipped study, costs measured on this machine, and why."""
    from rich.console import Console

    from .lab.choose import Needs, write_report
    from .lab.choose import choose as run
    from .lab.choose.needs import amount
    from .lab.choose.report import caveat, table
    from .lab.files import prepare

    kept = None if memory is None else amount(memory, "--memory")
    asked = amount(context, "--context")
    if file is not None:
        prepare(file.parent, f"--report {file}")
    needs = Needs(asked, task, kept, device, answer, dim, layers, heads, batch, minutes, among=tuple(among or ()))
    with Console(stderr=True).status("measuring") as status:
        choice = run(needs, tick=lambda share, name: status.update(f"measuring {name} ({share:.0%} of the time)"))
    if file is not None:
        write_report(choice, file)
    if as_json:
        say(json.dumps(choice.as_dict()))
        return
    say(choice.verdict)
    Console().print(table(choice))
    say(caveat(choice))
    if file is not None:
        say(f"report: {file}")


@app.command()
def sweep(
    methods: Annotated[list[str] | None, typer.Argument(help="names, or name:key=value,... (default: all, at several settings)")] = None,
    model: Annotated[str, typer.Option(help="tiny, or a folder in transformers' format")] = "tiny",
    cache: Annotated[
        str | None, typer.Option(help="a model whose cache is swept by policies instead: tiny, smollm2-135m, or a folder")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the text that ships with Python)")] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens a prompt (default: 2048; with --cache 1024)")] = None,
    needles: Annotated[int, typer.Option(help="prompts with a hidden fact, at each of five depths")] = 4,
    windows: Annotated[int, typer.Option(help="held-out texts")] = 4,
    steps: Annotated[int, typer.Option(help="with --cache: tokens read after each prompt")] = 128,
    directory: Annotated[Path, typer.Option("--out", help="where report.json, table.md and the plots go")] = Path("runs/sweep"),
    resume: Annotated[bool, typer.Option("--resume", help="with --cache: keep what an interrupted sweep measured")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything measured, as JSON")] = False,
) -> None:
    """Sparse mechanisms in the prefill of a pretrained model: bits per byte, needles found and time, against density.

    With --cache: policies that drop entries of the model's cache or store them in fewer bits, against kept bytes.
    """
    from .lab import sweep as lab
    from .tasks.text import python_text, read_text

    length = seq_len or (2048 if cache is None else 1024)
    corpus = python_text() if text is None else read_text(text, 50 * length)
    if cache is not None:
        config = lab.CacheConfig(length, windows, steps, needles)
        done = lab.CacheSweep.read(directory / "report.json") if resume and (directory / "report.json").exists() else None
        policies = lab.chosen_policies(methods or [])
        swept = None
        for swept in lab.cache_sweep(*lab.model_and_reader(cache), corpus, policies, config, cache, done):
            lab.write_points(swept, directory)
            if not as_json:
                say(lab.cache_line(swept.points[-1]))
        assert swept is not None
        lab.write_cache(swept, directory)
        say(json.dumps(swept.as_dict()) if as_json else f"report: {directory / 'table.md'}")
        return
    if resume:
        raise RegardError("--resume is of --cache; leave it out")
    chosen: dict[str, tuple[str, ...]] = {} if methods else dict(lab.DEFAULT)
    for one in methods or []:
        name, colon, settings = one.partition(":")
        chosen[name] = (*chosen.get(name, ()), *((settings,) if colon else lab.DEFAULT.get(name, ("",))))
    found, reader = lab.model_and_reader(model)
    result = None
    for result in lab.sweep(found, reader, corpus, chosen, lab.Config(length=length, windows=windows, needles=needles), model):
        lab.write_points(result, directory)
        p = result.points[-1]
        line = f"{p.name:16} density {p.density:.3f}  bits/byte {p.bits_per_byte:.3f}  needles {p.found:.2f}  prefill {p.prefill:.2f}x  "
        if not as_json:
            say(line + p.settings)
    assert result is not None
    lab.write(result, directory)
    say(json.dumps(result.as_dict()) if as_json else f"report: {directory / 'table.md'}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="the benchmark: cab")],
    methods: Annotated[list[str], typer.Argument(help="names, or name:key=value,...")],
    steps: Annotated[int, typer.Option(help="training steps of each net")] = 50,
    length: Annotated[int, typer.Option(help="tokens of the tasks' long side, even, 64 or more")] = 64,
    seed: Annotated[int, typer.Option(help="seed of the first run")] = 0,
    seeds: Annotated[int, typer.Option(help="runs of each net; their mean counts")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="everything measured, as JSON")] = False,
) -> None:
    """Attentions in four patterns (noncausal and causal, self and cross) on seven small tasks: one table, and what was refused."""
    if name != "cab":
        raise RegardError(f"benchmark {name!r} is not known; expected cab")
    if not 1 <= seeds <= 100 or not 0 <= seed < 2**31 - 100:
        raise RegardError(f"--seeds {seeds}, --seed {seed}: expected 1 to 100, and 0 to 2147483547")
    from .lab.memory import peak_bytes
    from .zoo.analysis.cab import cab

    report = cab(methods, steps=steps, length=length, seeds=range(seed, seed + seeds), peak=peak_bytes)
    if as_json:
        say(json.dumps(report.as_dict()))
        return
    from rich.console import Console

    Console().print(report)
    for line in report.refusals():
        say(line)


@app.command()
def look(
    model: Annotated[str, typer.Argument(help="tiny, smollm2-135m, or a folder in transformers' format")],
    text: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the text that ships with Python)")] = None,
    tokens: Annotated[int, typer.Option(help="of the text that are read, the first ones")] = 512,
    questions: Annotated[int, typer.Option(help="facts hidden in the text and asked for")] = 4,
    file: Annotated[Path, typer.Option("--out", help="the page")] = Path("runs/look.html"),
) -> None:
    """What a model's heads look at: sinks, retrieval, induction, spread and reach, a heat map each, in one HTML file."""
    from .lab.look import best, write
    from .lab.look import look as run
    from .tasks.text import python_text, read_text

    corpus = python_text(8 * tokens) if text is None else read_text(text, 64)
    found = run(model, bytes(corpus.train.tolist() + corpus.valid.tolist()), tokens, questions)
    write(found, file)
    for title, table, _ in found.tables:
        say(f"{title:18} {best(table, 3)}")
    say(f"page: {file}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="tiny, smollm2-135m, or a folder in transformers' format")],
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    strategy: Annotated[str, typer.Option(help="how tokens are guessed; `plain` guesses none")] = "prompt-lookup",
    draft: Annotated[str | None, typer.Option(help="a smaller model of the same vocabulary that guesses instead")] = None,
    tokens: Annotated[int, typer.Option(help="at most so many new tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time; else tokens are drawn")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of what is drawn")] = 0,
) -> None:
    """Continue a prompt, several tokens a pass of the model: text on standard output, a line of statistics on standard error."""
    from .lab.speak import speak

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    line = speak(model, prompt, strategy, draft, tokens, temperature, seed, show)
    say("")
    sys.stderr.write(line + "\n")


def say(line: str) -> None:
    """A line on standard output, as it is: no mark-up, no wrapping, no colours."""
    sys.stdout.write(line + "\n")


def main() -> None:
    """Entry point of `regard`."""
    for stream in (sys.stdout, sys.stderr):  # a console may not know every letter
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    usage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")  # typer carries its own click
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except RegardError as why:
        message = " ".join(str(why).split())
    except usage as why:
        message = why.format_message()
    except typer.Abort:
        sys.exit(130)
    sys.stderr.write(f"regard: {message}\n")
    sys.exit(2)
