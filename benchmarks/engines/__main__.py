"""Serve a dynamic adapter with real engines and compare with PEFT, token by token.

    make engines DATA=FOLDER

Trains a dynamic-rank adapter of SmolLM2-135M on E2E NLG (FOLDER contains its parquet files) and
exports it to each engine's format. PEFT and the engines then continue the same 20 prompts greedily
in float32. The check fails unless the exported adapter agrees with PEFT on at least 19 of 20
prompts in each engine, and the deliberately broken adapters do not. Engines run one after another,
each in its own environment (.venv-vllm and so on).

Intermediate files stay in the work folder; an existing adapter there is not trained again. With
`--engines` the results of other engines for the same adapter stay in the record.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.engines.base_model import save_base
from benchmarks.engines.compare import compare
from benchmarks.engines.reference import choose_prompts, continue_greedily
from benchmarks.engines.serve import ENGINES, Setting, export
from benchmarks.engines.train_adapter import train_adapter
from benchmarks.engines.variants import BREAKS, make_variants, read_config

PROMPTS = 20
NEW_TOKENS = 48


def main() -> None:
    """Run every step and write the result; exit with 1 if an engine does not agree."""
    options = _options()
    work: Path = options.work
    base, native = work / "base", work / "adapter"
    if not (work / "training.json").is_file():
        save_base(base, work / "base.gguf")
        training = train_adapter(base, options.data, native, steps=options.steps)
        (work / "training.json").write_text(json.dumps(training))
    adapters = make_variants(native, export(native, "uniform", work / "uniform"), work)
    prompts = choose_prompts(base, options.data, count=PROMPTS)
    reference = {
        "base": continue_greedily(base, None, prompts, new_tokens=NEW_TOKENS),
        "adapter": continue_greedily(base, native, prompts, new_tokens=NEW_TOKENS),
    }
    (work / "peft.json").write_text(json.dumps(reference))
    setting = Setting(
        work=work,
        base=base,
        adapters=adapters,
        prompts=prompts,
        expected=[continuation["tokens"] for continuation in reference["adapter"]],
        new_tokens=NEW_TOKENS,
    )
    served = {name: ENGINES[name](setting) for name in options.engines}
    result = {
        "training": json.loads((work / "training.json").read_text()),
        "uniform_rank": read_config(adapters["uniform"])["r"],
        "bytes": {name: _weights(adapters[name]).stat().st_size for name in ("native", "uniform")},
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "peft_with_and_without_adapter": compare(reference["adapter"], reference["base"])["equal"],
        "versions": {name: version(name) for name in ("peft", "transformers", "torch", "gguf")},
        "engines": {name: _judge(reference, made) for name, (made, _) in served.items()},
        "printed_by_the_documents": {
            name: printed for name, (_, printed) in served.items() if printed
        },
    }
    result = _with_others(result, options.out)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not all(engine["passed"] for engine in result["engines"].values()):
        sys.exit("An engine does not agree with PEFT, or a broken adapter went unnoticed.")


def _with_others(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the result with those of other engines from an earlier one for the same adapter."""
    before = json.loads(out.read_text()) if out.is_file() else {}
    if before.get("training") != result["training"]:
        return result
    merged = {key: before[key] | result[key] for key in ("engines", "printed_by_the_documents")}
    return result | {
        key: {name: found[name] for name in ENGINES if name in found}
        for key, found in merged.items()
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of E2E NLG's parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/engines"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=100)
    return parser.parse_args()


def _weights(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"


def _judge(reference: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's agreement with PEFT for each form of the adapter, and the verdict."""
    forms = {
        name: compare(reference["adapter"], continuations)
        for name, continuations in made["continuations"].items()
    }
    broken = [forms[name]["passed"] for name in (*BREAKS, "none") if name in forms]
    right = [forms[name]["passed"] for name in ("uniform", "switched") if name in forms]
    alone = made["continuations"].get("none")
    return {
        "versions": made["versions"],
        "passed": all(right) and not any(broken),
        **({} if alone is None else {"base_model_alone": compare(reference["base"], alone)}),
        **({"measured": made["measured"]} if "measured" in made else {}),
        **forms,
    }


if __name__ == "__main__":
    main()
