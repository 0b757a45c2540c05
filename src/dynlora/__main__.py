"""`dynlora` and `python -m dynlora`: the command line, where the packages of `dynlora[cli]` are."""

import sys
from importlib.util import find_spec

PACKAGES = (
    "PIL", "datasets", "filelock", "gguf", "jinja2", "jsonargparse", "matplotlib", "pyarrow",
    "regex", "rich", "scipy", "shtab", "sklearn", "tokenizers", "trl",
)  # fmt: skip
"""Packages of the extra `cli`, by the names that Python imports."""


def main() -> int:
    """Run the command line, or print how to install it.

    Returns:
        The exit code: 2 if a package is missing, else that of `dynlora.cli.main`.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {', '.join(missing)}: pip install 'dynlora[cli]'",
            file=sys.stderr,
        )
        return 2
    from dynlora.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
