"""The command `gpustore`. Errors are one sentence and exit code 1."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from gpustore import devices, errors, listing, tree
from gpustore.julia import ArraySpec, LostArray, OpaqueFunction, Struct
from gpustore.load import StoredFile, open_file
from gpustore.values import Entries
from gpustore.verify import Verification

_MAX_CHILDREN = 60  # of one list; the rest is counted
_MAX_CODE_LINES = 12
_MAX_WIDTH = 100
_FILE = click.Path()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpustore")
def cli() -> None:
    """Look into, check and convert the .bson model files of gpustore and Julia."""


@cli.command()
@click.argument("file", type=_FILE)
def inspect(file: str) -> None:
    """Show what FILE holds, without loading arrays: names, dtypes, shapes, devices, bytes."""
    with open_file(file) as stored:
        value = stored.value(make_array=lambda spec, path: spec)
        click.echo(f"{stored.path}: {_size(stored.nbytes)}, {stored.origin}")
        entries = value.items() if type(value) in (dict, Entries) else [("(the file)", value)]
        seen: set[int] = set()
        for name, child in entries:
            for line in _lines(str(name), child, 0, seen):
                click.echo(line)
        click.echo(_summary(stored, value))


def _lines(label: str, node: Any, depth: int, seen: set[int]) -> Iterator[str]:
    """Yield the lines of one node and all below it; a shared container is shown once."""
    indent = "  " * depth
    below = tree.children(node) if not isinstance(node, (ArraySpec, LostArray)) else []
    if not below:
        yield from _indented(indent, f"{label}: {_leaf(node)}")
        return
    if id(node) in seen:
        first = _title(node).partition("\n")[0]
        yield f"{indent}{label}: {first} (shared, shown above)"
        return
    seen.add(id(node))
    yield from _indented(indent, f"{label}: {_title(node)}")
    for suffix, child in below[:_MAX_CHILDREN]:
        yield from _lines(suffix.removeprefix("."), child, depth + 1, seen)
    if len(below) > _MAX_CHILDREN:
        yield f"{indent}  ... {len(below) - _MAX_CHILDREN} more"


def _indented(indent: str, text: str) -> Iterator[str]:
    yield from (f"{indent}{line}" for line in text.split("\n"))


def _title(node: Any) -> str:
    if isinstance(node, (dict, list, tuple)) and not hasattr(node, "_fields"):
        return f"{type(node).__name__} of {len(node)}"
    if isinstance(node, Struct):
        return _short(repr(node.type))
    if isinstance(node, OpaqueFunction):
        return _function(node)
    return type(node).__name__


def _function(node: OpaqueFunction) -> str:
    """Return what a Julia function does, in a few lines; its name where that is not known."""
    lines = listing.rendered(node).split("\n")
    if len(lines) > _MAX_CODE_LINES:
        more = len(lines) - _MAX_CODE_LINES
        lines[_MAX_CODE_LINES:] = [f"  ... {more} more lines"]
    return "Julia function " + "\n".join(map(_short, lines))


def _leaf(node: Any) -> str:
    if isinstance(node, ArraySpec):
        order = "row-major, " if node.order == "C" else ""
        return f"{node.dtype} {node.shape}, {order}{node.device}, {_size(node.nbytes)}"
    if isinstance(node, LostArray):
        return f"{node.element_type} {node.shape}, values lost on the GPU"
    if isinstance(node, OpaqueFunction):
        return _function(node)
    if callable(node) and hasattr(node, "__name__"):
        return str(node.__name__)
    return _short(repr(node))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 3] + "..."


def _arrays(count: int) -> str:
    return "1 array" if count == 1 else f"{count} arrays"


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{nbytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _summary(stored: StoredFile, value: Any) -> str:
    total = sum(entry.nbytes for entry in stored.arrays)
    lost = sum(isinstance(node, LostArray) for _, node in tree.walk(value))
    text = f"{_arrays(len(stored.arrays))}, {_size(total)}. Loads without a GPU: "
    if lost:
        return text + (
            f"no, {_arrays(lost)} saved from the GPU as pointers; their values are lost "
            "(load the rest with lost='placeholder')"
        )
    if stored.tags:
        tags = ", ".join(f"{_arrays(count)} on {tag}" for tag, count in stored.tags.items())
        status = devices.cuda_status()
        here = f"arrays travel {status.transfers}" if status else status.message
        text += f"only with device='cpu' ({tags}); `gpustore cpu` makes a file that does"
        return f"{text}\nHere: {here}"
    return text + "yes"


@cli.command()
@click.argument("file", type=_FILE)
def verify(file: str) -> None:
    """Check every digest of FILE; exit code 1 and the damaged parts where one differs."""
    with open_file(file) as stored, _progress("verifying") as report:
        found = stored.verify(report)
    if not found:
        raise errors.IntegrityError(
            f"{file}: damaged: {', '.join(found.damaged)}; restore the file from a copy"
        )
    click.echo(f"{file}: {_verdict(found)}")


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback that shows a bar on a terminal, once the work has taken a second."""
    start, bar, is_shown = time.monotonic(), None, sys.stderr.isatty()

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and is_shown and time.monotonic() - start > 1:
            bar = click.progressbar(length=total, label=label, file=sys.stderr)
            bar.__enter__()
        if bar is not None:
            bar.update(done - bar.pos)

    try:
        yield report
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def _verdict(found: Verification) -> str:
    if not found.has_structure_digest and not found.arrays:
        return "no digests in this file (Julia writes none): nothing to verify"
    return f"ok, {_arrays(found.arrays)}" + (" and the structure" * found.has_structure_digest)


@cli.command()
@click.argument("file", type=_FILE)
@click.option("-o", "--output", required=True, type=_FILE, help="The file to write.")
def cpu(file: str, output: str) -> None:
    """Write FILE without its device tags: a file that loads on every machine. Needs no GPU."""
    with open_file(file) as stored:
        value = stored.value(make_array=lambda spec, path: spec)
        lost = [path for path, node in tree.walk_entries(value) if isinstance(node, LostArray)]
        if lost:
            raise errors.DeviceDataLostError(
                f"{file}: the values of {len(lost)} arrays are not in the file (Julia saved GPU "
                "pointers); save cpu(model) in Julia"
            )
        with _progress("writing") as report:
            stored.save_for_cpu(output, report)
        click.echo(f"{output}: written, {_arrays(len(stored.arrays))} for the CPU")


@cli.command()
@click.argument("source", type=_FILE)
@click.argument("target", type=_FILE)
@click.option("--arrays-only", is_flag=True, help="Leave out what TARGET's kind cannot hold.")
@click.option("--unshare", is_flag=True, help="Write an array that is in two places twice.")
def convert(source: str, target: str, arrays_only: bool, unshare: bool) -> None:
    """Write SOURCE as TARGET: each a .bson, .safetensors, .npz or .pt file, by its name."""
    from gpustore.convert import convert as write  # what reads other kinds of files

    with _progress("converting") as report:
        count = write(source, target, arrays_only=arrays_only, unshare=unshare, progress=report)
    click.echo(f"{target}: written, {_arrays(count)}")


def main() -> None:
    """Run the command; every error ends as one sentence on stderr and exit code 1."""
    code: Any = 0
    try:
        # not cli(): it takes an EOFError, as TruncatedFileError is one, for an interrupt
        with cli.make_context("gpustore", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = _fail("interrupted")
    except click.ClickException as error:
        code = _fail(error.format_message())
    except MemoryError as error:
        code = _fail(f"out of memory: {error}")
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except (errors.GpustoreError, OSError) as error:
        code = _fail(str(error))
    sys.exit(code)


def _fail(sentence: str) -> int:
    click.echo("gpustore: " + " ".join(sentence.split()), err=True)
    return 1
