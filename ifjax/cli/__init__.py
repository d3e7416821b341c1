"""The command line."""

from ifjax.cli.compare import (
    _FIGURES as _FIGURES,
)
from ifjax.cli.compare import (
    _add_compare as _add_compare,
)
from ifjax.cli.compare import (
    _compare as _compare,
)
from ifjax.cli.compare import (
    _figures as _figures,
)
from ifjax.cli.compare import (
    _formats as _formats,
)
from ifjax.cli.compare import (
    _left_table as _left_table,
)
from ifjax.cli.compare import (
    _print_report as _print_report,
)
from ifjax.cli.compare import (
    _print_synthetic as _print_synthetic,
)
from ifjax.cli.compare import (
    _synthetic_cell as _synthetic_cell,
)
from ifjax.cli.compare import (
    _synthetic_dict as _synthetic_dict,
)
from ifjax.cli.compare import (
    _thousandths as _thousandths,
)
from ifjax.cli.compare import (
    _why_nothing as _why_nothing,
)
from ifjax.cli.compare import (
    _write_plots as _write_plots,
)
from ifjax.cli.convert import (
    _IN as _IN,
)
from ifjax.cli.convert import (
    _OUT as _OUT,
)
from ifjax.cli.convert import (
    _add_dequantize as _add_dequantize,
)
from ifjax.cli.convert import (
    _add_output as _add_output,
)
from ifjax.cli.convert import (
    _add_quantize as _add_quantize,
)
from ifjax.cli.convert import (
    _bytes as _bytes,
)
from ifjax.cli.convert import (
    _check_target as _check_target,
)
from ifjax.cli.convert import (
    _dequantize as _dequantize,
)
from ifjax.cli.convert import (
    _ended_by_signal as _ended_by_signal,
)
from ifjax.cli.convert import (
    _files_of as _files_of,
)
from ifjax.cli.convert import (
    _format as _format,
)
from ifjax.cli.convert import (
    _quantize as _quantize,
)
from ifjax.cli.convert import (
    _rules as _rules,
)
from ifjax.cli.convert import (
    _sources as _sources,
)
from ifjax.cli.inspect import (
    _add_inspect as _add_inspect,
)
from ifjax.cli.inspect import (
    _add_verify as _add_verify,
)
from ifjax.cli.inspect import (
    _error_figures as _error_figures,
)
from ifjax.cli.inspect import (
    _inspect as _inspect,
)
from ifjax.cli.inspect import (
    _verify as _verify,
)
from ifjax.cli.main import (
    _parser as _parser,
)
from ifjax.cli.main import (
    main as main,
)
from ifjax.cli.terminal import (
    _add_json as _add_json,
)
from ifjax.cli.terminal import (
    _add_search as _add_search,
)
from ifjax.cli.terminal import (
    _as_file_error as _as_file_error,
)
from ifjax.cli.terminal import (
    _command as _command,
)
from ifjax.cli.terminal import (
    _console as _console,
)
from ifjax.cli.terminal import (
    _input as _input,
)
from ifjax.cli.terminal import (
    _Misused as _Misused,
)
from ifjax.cli.terminal import (
    _progress as _progress,
)
from ifjax.cli.terminal import (
    _sentence as _sentence,
)
from ifjax.cli.terminal import (
    _size as _size,
)
from ifjax.cli.terminal import (
    _table as _table,
)
from ifjax.cli.terminal import (
    _ticks as _ticks,
)
from ifjax.cli.terminal import (
    _tracked as _tracked,
)
from ifjax.cli.terminal import (
    _without_infinities as _without_infinities,
)
