"""`dynlora schema`: print the JSON Schema of a job file, which does not check keys together."""

import json
from typing import Any

from dynlora.cli.arguments import Verb
from dynlora.cli.output import Output
from dynlora.train.config.keys import job_schema


def run(_given: Any, output: Output) -> None:
    """Print the schema, even with `--quiet`."""
    schema = job_schema()
    output.write(json.dumps(schema, indent=2), schema)


COMMAND = Verb("schema", "JSON Schema of CONFIG, for editors", run, [])
