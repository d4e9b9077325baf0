"""The operator's table of prices: a small TOML file, named by a variable.

currency = "USD"
put = 0.005          # 1000 PUT or LIST requests
get = 0.0004         # 1000 GET or HEAD requests
delete = 0           # 1000 DELETE requests
storage = 0.023      # a GiB for a month
download = 0.09      # a GiB that is read
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from snapchain.errors import InvalidInput, NotFound
from snapchain.host.private import read_trusted
from snapchain.model.traffic import Prices

VARIABLE = "SNAPCHAIN_PRICES"


def prices_of(environment: Mapping[str, str]) -> Prices | None:
    """The table in the file that the variable names; None where it names none. Raises InvalidInput, NotFound."""
    name = environment.get(VARIABLE)
    if not name:
        return None
    path = Path(name).absolute()
    try:
        return Prices.model_validate(tomllib.loads(read_trusted(path).decode()))
    except NotFound as error:
        error.hint = f"{VARIABLE} names a table of prices"
        raise
    except ValidationError as error:
        first = error.errors()[0]
        said = "is unknown" if first["type"] == "extra_forbidden" else f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        words = f"{'.'.join(map(str, first['loc']))}: {said}"
        known = ", ".join(Prices.model_fields)
        raise InvalidInput(f"a wrong table of prices: {words}", subject=path, hint=f"its fields are {known}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"not TOML: {error}", subject=path, hint=f"{VARIABLE} names a table of prices") from error
