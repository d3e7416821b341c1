"""Tile sizes of the packed GPU matmul: a record, and a table of tiles per device kind, read from `tiles.json`.

Only a measurement shows which tiles are fastest. Each entry of the table states the measurement that chose it, or null
for a guess. `python -m pallas_kernels.autotune` measures and writes a new table.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp

UNIT_N, UNIT_K = 64, 128  # rows and columns of W in one packed unit; see gpu_matmul
SHARED_MEMORY = 232448 - 1024  # bytes available to a block on Hopper, minus barriers and alignment
FILE = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of x @ W.T: each thread block computes `m` rows of x by 64 * `n_warpgroups` rows of W.

    Attributes:
        m: rows of x per block: a multiple of 8, at most 256.
        n_warpgroups: warpgroups along N, with 64 rows of W each.
        k_warpgroups: warpgroups that split the K of one block; their partial sums are added in shared memory.
        k_units: units of 128 along K that each of them processes in one pipeline step.
        stages: pipeline steps in flight.
        blocks: thread blocks of the persistent grid, one per multiprocessor.
        band: number of tiles along x that are processed together, so that their shared operands stay in the L2 cache.
        cluster: adjacent blocks along N that load their common x together, each a part for all (TMA multicast).

    Raises:
        ValueError: a field is not positive, m is not a multiple of 8 up to 256, there is only one stage, more than four
            warpgroups compute, or a cluster has more than eight blocks or more than there are.
    """

    m: int
    n_warpgroups: int = 1
    k_warpgroups: int = 1
    k_units: int = 1
    stages: int = 4
    blocks: int = 132
    band: int = 4
    cluster: int = 1

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"tiles need positive fields, got {self}")
        if self.stages < 2:
            raise ValueError(f"a pipeline has at least two stages, one to load and one to compute: got {self.stages}")
        if self.m % 8 or self.m > 256:
            raise ValueError(f"a block takes a multiple of 8 rows of x, 256 at most: got m={self.m}")
        if self.cluster > min(8, self.blocks):
            raise ValueError(f"a cluster has at most 8 blocks, and not more than there are: got {self}")
        if self.warpgroups > 4:
            raise ValueError(f"at most 4 warpgroups compute, got {self.n_warpgroups} x {self.k_warpgroups}")

    @property
    def warpgroups(self) -> int:
        """The number of computing warpgroups; one more warpgroup loads."""
        return self.n_warpgroups * self.k_warpgroups

    @property
    def n(self) -> int:
        """The rows of W per block."""
        return UNIT_N * self.n_warpgroups

    @property
    def k(self) -> int:
        """The length along K of one pipeline step."""
        return UNIT_K * self.k_warpgroups * self.k_units

    @property
    def _steps_bytes(self) -> int:
        """The bytes of shared memory for operands and partial sums, for a 16-bit x."""
        stage = 2 * self.m * self.k + self.n * self.k * 9 // 16
        return stage * self.stages + 4 * (self.k_warpgroups - 1) * self.n * self.m

    def written(self, out_dtype) -> tuple[int, int]:
        """Return (rows of the result per write, number of writes in flight).

        Their product is as large as the remaining shared memory allows, with at most 64 rows per write and 4 writes.
        """
        free = (SHARED_MEMORY - self._steps_bytes) // (self.n * jnp.dtype(out_dtype).itemsize)
        rows = [rows for rows in range(8, 65, 8) if self.m % rows == 0]
        ways = [(r, times) for r in rows for times in range(1, 5) if r * times <= min(free, self.m)]
        return max(ways, key=lambda way: (way[0] * way[1], way[0]), default=(8, 1))

    def shared_bytes(self, out_dtype) -> int:
        """Return the bytes of shared memory that a block uses, for a 16-bit x."""
        rows, times = self.written(out_dtype)
        return self._steps_bytes + rows * times * self.n * jnp.dtype(out_dtype).itemsize

    def misfit(self, n: int, k: int, out_dtype) -> str | None:
        """Return the reason why these tiles cannot multiply weights packed from [n, k]; None if they can."""
        n, k = padded(n, k)
        if n % (self.n * self.cluster) or k % self.k:
            return f"tiles of {self.n * self.cluster} x {self.k} do not divide the padded weights, {n} x {k}"
        if (needed := self.shared_bytes(out_dtype)) > SHARED_MEMORY:
            return f"tiles take {needed} bytes of shared memory, and there are {SHARED_MEMORY}: take fewer stages"
        return None


def padded(n: int, k: int) -> tuple[int, int]:
    """Return the padded shape of packed weights [n, k]: multiples of two units along N and along K."""
    return -(-n // (2 * UNIT_N)) * 2 * UNIT_N, -(-k // (2 * UNIT_K)) * 2 * UNIT_K


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of the table: tiles for at most `max_m` rows of x (None: any), and for one n, k and dtype (None: any).

    `measured` describes the measurement that chose them, with microseconds, versions and date; None for a guess.
    """

    tiles: Tiles
    max_m: int | None = None
    n: int | None = None
    k: int | None = None
    dtype: str | None = None
    measured: dict | None = None

    def suits(self, m: int, n: int, k: int, dtype) -> bool:
        wanted = ((self.n, n), (self.k, k), (self.dtype, jnp.dtype(dtype).name))
        return (self.max_m is None or m <= self.max_m) and all(mine in (None, given) for mine, given in wanted)


def read(file: Path = FILE) -> dict[str, list[Entry]]:
    """Read a table from a file: device kinds and their entries, of which `choose` takes the first that suits."""
    table = json.loads(Path(file).read_text())
    return {kind: [Entry(**row | {"tiles": Tiles(**row["tiles"])}) for row in rows] for kind, rows in table.items()}


def dump(table: dict[str, list[Entry]]) -> str:
    """Return the table as JSON text, with one line per entry."""
    kinds = []
    for kind, entries in table.items():
        rows = ",\n".join("    " + json.dumps(dataclasses.asdict(entry)) for entry in entries)
        kinds.append(f"  {json.dumps(kind)}: [\n{rows}\n  ]")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


_table = functools.cache(read)


def choose(device_kind: str, m: int, n: int, k: int, dtype, out_dtype=None) -> Tiles:
    """Return tiles for x [m, k] of `dtype` and weights [n, k], from the table's first suitable entry for the device.

    `device_kind` is that of `jax.Device`, such as "NVIDIA H200", and contains a device name of the table. Devices that
    are not in the table use the entries of the H200.

    Raises:
        ValueError: no entry is suitable.
    """
    table = _table()
    entries = next((rows for kind, rows in table.items() if kind in device_kind), table["H200"])
    for entry in entries:
        if entry.suits(m, n, k, dtype) and entry.tiles.misfit(n, k, out_dtype or dtype) is None:
            return entry.tiles
    raise ValueError(
        f"no tiles for {m} x {n} x {k} in {jnp.dtype(dtype).name} on {device_kind}: add an entry to {FILE.name}"
    )
