"""Entry point of `dynlora` and `python -m dynlora`: checks for the packages of `dynlora[cli]`."""

import sys
from importlib.util import find_spec

PACKAGES = (
    "PIL", "click", "datasets", "filelock", "gguf", "jinja2", "pyarrow", "pydantic", "regex",
    "rich", "scipy", "sklearn", "starlette", "tokenizers", "trl", "uvicorn",
)  # fmt: skip
"""Import names of the packages of the extra `cli`."""


def main() -> int:
    """Run the command line, or print how to install it.

    Returns:
        Exit code: 2 if a package is missing, else the exit code of `dynlora.cli.main`.
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
