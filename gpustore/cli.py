"""The command `gpustore`. Errors are one sentence; docs/command.md has the exit codes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click
from click.shell_completion import shell_complete

from gpustore import errors, tree
from gpustore.inspection import as_json, counted_arrays, figures_of
from gpustore.inspection import inspect as inspected
from gpustore.julia import LostArray
from gpustore.notebook import printable, size_text
from gpustore.stored import open_file
from gpustore.terminal import console, progress, shown
from gpustore.verify import Verification

_FILE = click.Path()
_COMPLETION = "_GPUSTORE_COMPLETE"  # the variable in which a shell asks for completions
_FAILED, _WRONG_USE, _INTERRUPTED = 1, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gpustore")
def cli() -> None:
    """Look into, check, compare and convert the .bson model files of gpustore and Julia.

    \b
    Examples:
      gpustore inspect model.bson            what is in it, and does it need a GPU
      gpustore verify model.bson             is it whole
      gpustore cpu tagged.bson -o cpu.bson   make it load everywhere
      gpustore COMMAND --help                examples of each command
    """


@cli.command()
@click.argument("file", type=_FILE)
@click.option("--arrays", is_flag=True, help="A table of the arrays in place of the tree.")
@click.option("--stats", is_flag=True, help="The table, with min, max, mean, NaN and zeros.")
@click.option("--json", "is_json", is_flag=True, help="The same as JSON, for other programs.")
def inspect(file: str, arrays: bool, stats: bool, is_json: bool) -> None:
    """Show what FILE holds: types, shapes, devices, and who wrote it.

    No array is loaded; --stats reads each once, in bounded memory.

    \b
    Examples:
      gpustore inspect model.bson
      gpustore inspect model.bson --stats
      gpustore inspect model.bson --json | jq '.arrays[].path'
    """
    with open_file(file) as stored:
        found = inspected(stored)
        measured = None
        if stats:
            with progress("reading") as report:
                measured = figures_of(stored, report)
    if is_json:
        click.echo(json.dumps(as_json(found, measured), indent=2, allow_nan=False))
        return
    from gpustore.outline import array_table, entry_trees

    screen = console()
    heading = f"{found.path}: {size_text(found.nbytes)}, {found.origin}"
    screen.print(shown(heading), style="bold")
    if found.era is not None:
        screen.print(f"layers laid out as by {found.era}")
    if arrays or stats:
        screen.print(array_table(found, measured))
    else:
        screen.print(*entry_trees(found), sep="\n")
    screen.print(found.verdict())


@cli.command()
@click.argument("file", type=_FILE)
def verify(file: str) -> None:
    """Check every digest of FILE, and name what is damaged.

    \b
    Examples:
      gpustore verify model.bson
      gpustore verify model.bson && scp model.bson server:
    """
    with open_file(file) as stored, progress("verifying") as report:
        found = stored.verify(report)
    if not found:
        raise errors.IntegrityError(
            f"{file}: damaged: {', '.join(found.damaged)}; restore the file from a copy"
        )
    _say(f"{file}: {_verdict(found)}")


def _verdict(found: Verification) -> str:
    if not found.has_structure_digest and not found.arrays:
        return "no digests in this file (Julia writes none): nothing to verify"
    return f"ok, {counted_arrays(found.arrays)}" + (
        " and the structure" * found.has_structure_digest
    )


@cli.command()
@click.argument("file", type=_FILE)
@click.option("-o", "--output", required=True, type=_FILE, help="The file to write.")
def cpu(file: str, output: str) -> None:
    """Write FILE without device tags: it loads on every machine. Needs no GPU.

    \b
    Example:
      gpustore cpu tagged.bson -o model.bson
    """
    with open_file(file) as stored:
        value = stored.value(make_array=lambda spec, path: spec)
        lost = [path for path, node in tree.walk_entries(value) if isinstance(node, LostArray)]
        if lost:
            raise errors.DeviceDataLostError(
                f"{file}: the values of {len(lost)} arrays are not in the file (Julia saved GPU "
                "pointers); save cpu(model) in Julia"
            )
        with progress("writing") as report:
            stored.save_for_cpu(output, report)
        _say(f"{output}: written, {counted_arrays(len(stored.arrays))} for the CPU")


@cli.command()
@click.argument("source", type=_FILE)
@click.argument("target", type=_FILE)
@click.option("--arrays-only", is_flag=True, help="Leave out what TARGET's kind cannot hold.")
@click.option("--unshare", is_flag=True, help="Write an array that is in two places twice.")
def convert(source: str, target: str, arrays_only: bool, unshare: bool) -> None:
    """Write SOURCE as TARGET: .bson, .safetensors, .npz or .pt.

    The names say of which kind each is. What TARGET's kind cannot hold is refused by name, and
    nothing is written.

    \b
    Examples:
      gpustore convert checkpoint.pt model.bson
      gpustore convert model.bson weights.safetensors --arrays-only
    """
    from gpustore.convert import convert as write  # what reads other kinds of files

    with progress("converting") as report:
        count = write(source, target, arrays_only=arrays_only, unshare=unshare, progress=report)
    _say(f"{target}: written, {counted_arrays(count)}")


@cli.command()
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.0, metavar="T",
    help="Numbers at most T apart are the same.",
)  # fmt: skip
@click.pass_context
def diff(context: click.Context, a: str, b: str, tolerance: float) -> None:
    """Show what differs from A to B: structure, values, by how much.

    The exit code is 0 where nothing differs, 1 where something does, 2 where that cannot be told.
    Devices and memory order are no part of a value.

    \b
    Examples:
      gpustore diff before.bson after.bson
      gpustore diff gpu.bson cpu.bson --tolerance 1e-6
    """
    from gpustore.difference import difference

    with open_file(a) as old, open_file(b) as new, progress("comparing") as report:
        found = difference(old, new, tolerance=tolerance, progress=report)
    if not found:
        return
    screen = console()
    screen.print(shown(f"--- {a}"), style="red")
    screen.print(shown(f"+++ {b}"), style="green")
    for change in found.changes:
        mark, style = _MARKS[change.kind]
        screen.print(shown(f"{mark} {change.path}: {change.text}"), style=style)
    counts = ", ".join(f"{found.count(kind)} {kind}" for kind in _MARKS)
    screen.print(f"{counts}, {found.same} the same")
    context.exit(1)


_MARKS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}


@cli.command()
@click.argument("file", type=_FILE)
@click.option("-o", "--output", required=True, type=_FILE, help="A .png, .svg or .pdf file.")
def plot(file: str, output: str) -> None:
    """Draw histograms of the weights in FILE, layer by layer. Needs gpustore[plot].

    \b
    Example:
      gpustore plot model.bson -o weights.png
    """
    from gpustore.plot import plot as draw

    with open_file(file) as stored, progress("reading") as report:
        count = draw(stored, output, progress=report)
    _say(f"{output}: written, {counted_arrays(count)}")


def _say(sentence: str) -> None:
    click.echo(printable(sentence))


def main() -> None:
    """Run the command; every error ends as one sentence on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # names are not held back by an old encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if asked := os.environ.get(_COMPLETION):
        sys.exit(shell_complete(cli, {}, "gpustore", _COMPLETION, asked))
    failed = _WRONG_USE if sys.argv[1:2] == ["diff"] else _FAILED
    code: Any = 0
    try:
        # not cli(): it takes an EOFError, as TruncatedFileError is one, for an interrupt
        with cli.make_context("gpustore", sys.argv[1:] or ["--help"]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = _fail("interrupted", _INTERRUPTED)
    except click.ClickException as error:
        code = _fail(error.format_message(), _WRONG_USE)
    except MemoryError as error:
        code = _fail(f"out of memory: {error}", failed)
    except BrokenPipeError:
        sys.stderr.close()
        code = failed
    except (errors.GpustoreError, OSError) as error:
        code = _fail(_sentence(error), failed)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    """Return what an error says; of the system's, the file and then the reason, no number."""
    reason, name = getattr(error, "strerror", None), getattr(error, "filename", None)
    if not reason:
        return str(error)
    return reason if name is None else f"{os.fsdecode(name)}: {reason}"


def _fail(sentence: str, code: int) -> int:
    click.echo("gpustore: " + printable(" ".join(sentence.split())), err=True)
    return code
