"""Which array of a file goes where: made on the host while a file is lifted, then placed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np

from gpustore import devices, transfer, tree
from gpustore.document import SLOT_NBYTES, Slot
from gpustore.errors import (
    CUDAUnavailableError,
    FormatError,
    IntegrityError,
    UnsupportedValueError,
)
from gpustore.julia import ArraySpec
from gpustore.lift import Lifter
from gpustore.storage import MappedFile
from gpustore.workers import let_go

DeviceChoice = str | Mapping[str, str] | Callable[[str], str | None] | None
Check = Callable[[Container[int]], None]  # raises unless all payloads are whole but those there


class Placement:
    """Makes the host arrays of a file while it is lifted, then moves them to their devices.

    `choose(tag)` gives the device of each. With `is_verified` those on devices are verified there.
    """

    def __init__(
        self,
        file: MappedFile,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        choose: Callable[[str], str] = lambda tag: "cpu",
        *,
        is_verified: bool = False,
    ) -> None:
        self._file, self._functions, self._choose = file, functions, choose
        self._keeps_all = is_verified and choose("cpu") != "cpu"
        self._counts: dict[str, int] = defaultdict(int)  # of each tag, "cpu" for none
        self._made: dict[int, tuple[Any, ArraySpec, str]] = {}  # by id, the ones for devices

    def lifter(self, content: dict[str, Any], alike: Mapping[int, Any] | None = None) -> Lifter:
        """Return what lifts a document; `alike` says by id which of its nodes are alike."""
        path, make_row = self._file.path, self._make_row
        return Lifter(content, self.make, self.read, path, self._functions, make_row, alike)

    def read(self, slot: Slot) -> bytes:
        return bytes(self._file.buffer[slot.offset : slot.offset + slot.nbytes])

    def make(self, spec: ArraySpec, path: str) -> Any:
        array = host_array(self._file, spec, path)
        self._counts[spec.device] += 1
        if self._keeps_all or spec.device != "cpu":
            self._made[id(array)] = array, spec, path
        return array

    def _make_row(self, spec: ArraySpec, payloads: list[Any]) -> list[Any] | None:
        """Return arrays that differ in their bytes only, or None where it is not for this way."""
        if not spec.shape or spec.device != "cpu" or self._keeps_all:
            return None
        row: list[Any] | None = transfer.host_row(
            self._file.buffer, payloads, spec.dtype, spec.shape, spec.order
        )
        self._counts["cpu"] += 0 if row is None else len(row)
        return row

    def placed(self, root: Any, report: Callable[[int], None], check: Check | None) -> Any:
        """Return the tree with each array on its device; nothing large was read so far.

        Raises CUDAUnavailableError, and what `check` does of arrays that are not verified on a
        device.
        """
        targets = {tag: self._choose(tag) for tag in self._counts}
        away = {*targets.values()} - {"cpu"}
        if not away and check is None:
            return root
        self._require(away)
        found: dict[int, tuple[Any, str]] = {}
        if away:
            for _, leaf in tree.walk_entries(root):
                if isinstance(leaf, np.ndarray) and tree.is_numeric(leaf):
                    device = targets[self._tag(leaf)]
                    if device != "cpu":
                        found[id(leaf)] = leaf, device
        moved: dict[int, Any] = {}
        try:
            if found:
                from gpustore import ring  # 4 ms, for arrays of devices only

                with self._file.reader() as reader:
                    there = ring.to_devices([*found.values()], reader, report)
                moved.update(zip(found, there, strict=True))
                del there
            if check is not None:
                self._verify(moved, check)
        except BaseException as error:
            moved.clear()  # and what else holds memory of a device while the error lives
            let_go(error)
            raise
        return tree.rebuild(root, lambda node: moved.get(id(node), node)) if moved else root

    def _tag(self, array: Any) -> str:
        return self._made[id(array)][1].device if id(array) in self._made else "cpu"

    def _verify(self, moved: dict[int, Any], check: Check) -> None:
        """Compare the digests of arrays where they now lie, and the others' with the file."""
        whole: set[int] = set()
        differing: list[str] = []
        for device, members in self._verifiable(moved).items():
            from gpustore import kernels

            found = kernels.digests([octets for octets, _, _ in members])
            for (_, spec, path), digest in zip(members, found or (), strict=False):
                if digest != spec.digest:
                    differing.append(f"{path} on {device}")
                elif isinstance(spec.payload, Slot):
                    whole.add(spec.payload.offset)
        check(whole)
        if differing:
            raise IntegrityError(
                f"{self._file.path}: the digest differs for {', '.join(differing[:20])}, while the "
                "file is whole; the copy to the device went wrong: load it again, and test the "
                "memory and the GPU if this comes back"
            )

    def _verifiable(self, moved: dict[int, Any]) -> dict[str, list[tuple[Any, ArraySpec, str]]]:
        """Return by device the arrays that lie there as in the file, row-major, with digests."""
        there: dict[str, list[tuple[Any, ArraySpec, str]]] = {}
        for key, array in moved.items():
            _, spec, path = self._made.get(key, (None, None, ""))
            if spec is not None and spec.digest is not None:
                octets = array if spec.order == "C" else array.T
                if octets.flags.c_contiguous:
                    there.setdefault(devices.array_device(array), []).append((octets, spec, path))
        return there

    def _require(self, targets: set[str]) -> None:
        """Raise CUDAUnavailableError where a device that arrays go to cannot be used."""
        for device in sorted(targets):
            try:
                devices.require_cuda(device)
            except CUDAUnavailableError as error:
                tagged = ", ".join(
                    f"{n} arrays are tagged {tag}"
                    for tag, n in self._counts.items()
                    if tag != "cpu"
                )
                raise CUDAUnavailableError(
                    f"{self._file.path}: {tagged or f'arrays are wanted on {device}'}, but "
                    f"{error}. To load it here, pass device='cpu'; to make a file that loads "
                    "everywhere, save cpu(model)",
                    error.cause,
                ) from error


def host_array(file: MappedFile, spec: ArraySpec, path: str) -> Any:
    """Return the array a spec describes: a view of the mapped file, or of a copy of a small one."""
    payload: Any = spec.payload
    try:
        if type(payload) is Slot:
            offset, nbytes = payload
            if nbytes >= SLOT_NBYTES:
                return transfer.host_view(file.buffer, offset, spec.dtype, spec.shape, spec.order)
            payload = memoryview(file.buffer)[offset : offset + nbytes]
        return transfer.host_view(bytearray(payload), 0, spec.dtype, spec.shape, spec.order)
    except ValueError as error:  # sizes that NumPy cannot hold
        raise FormatError(f"{file.path}: {path}: shape {spec.shape}: {error}") from error


def chooser(device: DeviceChoice) -> Callable[[str], str]:
    """Return the function from a tag to the device its arrays go to."""
    if device is None:
        return devices.parse_device
    if isinstance(device, str):
        fixed = devices.parse_device(device)
        return lambda tag: fixed
    choose = device.get if isinstance(device, Mapping) else device
    if not callable(choose):
        raise UnsupportedValueError(
            f"device: expected None, a device, a mapping or a callable, found {device!r}"
        )
    return lambda tag: devices.parse_device(choose(tag) or tag)
