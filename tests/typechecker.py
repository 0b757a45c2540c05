"""What functions take and return, checked at run time: by beartype, for which 1 is a `float` too.

Where shapes are annotated jaxtyping calls it, and binds their names over the whole call. That takes
many times as long, so only modules that annotate shapes are left to it.
"""

import sys
from pathlib import Path

from beartype import BeartypeConf, beartype
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

CONF = BeartypeConf(
    is_pep484_tower=True,
    claw_is_pep526=False,
    # Configurations check their own values.
    claw_skip_package_names=("dynlora.config", "dynlora.train.config"),
)
checked = beartype(conf=CONF)


def check_types() -> None:
    """Check the functions of the package and the harness; neither may be imported yet."""
    assert not {"dynlora", "benchmarks.harness"} & set(sys.modules)
    install_import_hook(sorted(shaped_modules()), f"{__name__}.checked")
    beartype_packages(("dynlora", "benchmarks.harness"), conf=CONF)


def shaped_modules() -> set[str]:
    """Return the names of the modules that annotate shapes."""
    source = Path(__file__).parents[1] / "src"
    return {
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in source.rglob("*.py")
        if "from jaxtyping import" in path.read_text()
    }
