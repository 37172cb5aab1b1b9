"""`--arch list`: the table of all architectures."""

from minidl.summary import summarize
from minidl.wording import aligned, megabytes
from models import ALIASES, REGISTRY

BATCH_SIZE = 128  # for which memory is given


def table() -> str:
    """Name, parameters, multiply-accumulates of an image, memory kept for backward, published top-1, source."""
    rows = [("architecture", "source", "published top-1 %", "parameters", "MACs", "kept for backward")]
    for name, architecture in REGISTRY.items():
        costs = summarize(architecture.create(100, {}), batch_size=BATCH_SIZE)
        rows.append((name, architecture.source, architecture.published, f"{costs.parameters:,}", f"{costs.macs:,}",
                     megabytes(costs.activation_bytes)))
    aliases = ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items())
    return (f"{aligned(rows, left=3)}\n\nFor 100 classes and images of 32 x 32; memory for a batch of {BATCH_SIZE} in float32. "
            f"Published: on CIFAR-100, by the source.\nAliases: {aliases}. The numbers in resnext29-CxWd, "
            "res2next29-CcWwSs and wrn-D-K may be any, if D is 6 N + 4.")
