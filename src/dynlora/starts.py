"""Values of PEFT's `init_lora_weights` with which an adapter begins as a part of the base model."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(start: object) -> bool:
    """Return whether an adapter with this start changes its base model, by what its rank holds.

    PEFT does that again when it loads the adapter, at the rank that it was saved with.

    Args:
        start: `init_lora_weights` of a `LoraConfig`.
    """
    return str(start).lower().startswith(_BASE_CHANGING)
