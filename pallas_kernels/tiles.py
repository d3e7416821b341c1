"""How a packed matmul is cut into tiles: a record, and for each kind of device a table of them read from `tiles.json`.

Which cut is fastest only a measurement can say. The table states for each entry the measurement that chose it, or null
for a guess; `python -m pallas_kernels.autotune` measures and writes a new table.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp

UNIT_N, UNIT_K = 64, 128  # the weights of one packed unit; see gpu_matmul
SHARED_MEMORY = 232448 - 1024  # bytes a block may have on Hopper, less barriers and alignment
FILE = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A cut of x @ W.T into blocks of `m` rows of x by 64 * `n_warpgroups` rows of W.

    Attributes:
        m: rows of x in a block: a multiple of 8, up to 256.
        n_warpgroups: warpgroups side by side along N, 64 rows of W each.
        k_warpgroups: warpgroups that share the K of one block; their sums meet in shared memory.
        k_units: units of 128 K that each of them takes in one step of the pipeline.
        stages: steps in flight.
        blocks: thread blocks of the persistent grid, one for each multiprocessor.
        band: tiles of x that are walked together before the next, so that what they share stays in the L2 cache.
        cluster: blocks side by side along N that load their x together, each a part for all of them (TMA multicast).

    Raises:
        ValueError: a field is not positive, m is no multiple of 8 up to 256, there is one stage, more than four
            warpgroups compute, or a cluster has more than eight blocks.
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
        """Warpgroups that compute; one more loads."""
        return self.n_warpgroups * self.k_warpgroups

    @property
    def n(self) -> int:
        """Rows of W in a block."""
        return UNIT_N * self.n_warpgroups

    @property
    def k(self) -> int:
        """K in one step of the pipeline."""
        return UNIT_K * self.k_warpgroups * self.k_units

    @property
    def _steps_bytes(self) -> int:
        """Shared memory without the result's, for x of 16 bits."""
        stage = 2 * self.m * self.k + self.n * self.k * 9 // 16
        return stage * self.stages + 4 * (self.k_warpgroups - 1) * self.n * self.m

    def written(self, out_dtype) -> tuple[int, int]:
        """(rows of the result that are written at once, how many times as many may be on their way).

        Together as many as there is memory left for; at most 64 at once and four times as many on their way.
        """
        free = (SHARED_MEMORY - self._steps_bytes) // (self.n * jnp.dtype(out_dtype).itemsize)
        rows = [rows for rows in range(8, 65, 8) if self.m % rows == 0]
        ways = [(r, times) for r in rows for times in range(1, 5) if r * times <= min(free, self.m)]
        return max(ways, key=lambda way: (way[0] * way[1], way[0]), default=(8, 1))

    def shared_bytes(self, out_dtype) -> int:
        """Shared memory that a block takes, for x of 16 bits."""
        rows, times = self.written(out_dtype)
        return self._steps_bytes + rows * times * self.n * jnp.dtype(out_dtype).itemsize

    def misfit(self, n: int, k: int, out_dtype) -> str | None:
        """Why weights packed from [n, k] cannot be multiplied with these tiles; None if they can."""
        n, k = padded(n, k)
        if n % (self.n * self.cluster) or k % self.k:
            return f"tiles of {self.n * self.cluster} x {self.k} do not divide the padded weights, {n} x {k}"
        if (needed := self.shared_bytes(out_dtype)) > SHARED_MEMORY:
            return f"tiles take {needed} bytes of shared memory, and there are {SHARED_MEMORY}: take fewer stages"
        return None


def padded(n: int, k: int) -> tuple[int, int]:
    """The shape that weights [n, k] are padded to when packed: room for two warpgroups along N and along K."""
    return -(-n // (2 * UNIT_N)) * 2 * UNIT_N, -(-k // (2 * UNIT_K)) * 2 * UNIT_K


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: tiles for up to `max_m` rows of x (null: any), for one shape of W and one dtype, or for all.

    `measured` says what chose them: microseconds, versions and date; or null, if nothing did.
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
    """The table of a file: for each kind of device its entries, of which the first that suits is taken."""
    table = json.loads(Path(file).read_text())
    return {kind: [Entry(**row | {"tiles": Tiles(**row["tiles"])}) for row in rows] for kind, rows in table.items()}


def dump(table: dict[str, list[Entry]]) -> str:
    """The table as text, one line an entry."""
    kinds = []
    for kind, entries in table.items():
        rows = ",\n".join("    " + json.dumps(dataclasses.asdict(entry)) for entry in entries)
        kinds.append(f"  {json.dumps(kind)}: [\n{rows}\n  ]")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


_table = functools.cache(read)


def choose(device_kind: str, m: int, n: int, k: int, dtype, out_dtype=None) -> Tiles:
    """Tiles for x [m, k] of `dtype` and weights [n, k], by the table's first entry for this kind of device that suits.

    `device_kind` is what `jax.Device.device_kind` says, such as "NVIDIA H200"; a name of the table need only be part
    of it. Devices without a table are taken for an H200.

    Raises:
        ValueError: no entry suits.
    """
    table = _table()
    entries = next((rows for kind, rows in table.items() if kind in device_kind), table["H200"])
    for entry in entries:
        if entry.suits(m, n, k, dtype) and entry.tiles.misfit(n, k, out_dtype or dtype) is None:
            return entry.tiles
    raise ValueError(
        f"no tiles for {m} x {n} x {k} in {jnp.dtype(dtype).name} on {device_kind}: add an entry to {FILE.name}"
    )
