"""What can be learned, one file each; importing this package registers them all."""

from veneer.tasks import (
    causal_lm,
    diffusion,
    image_classification,
    image_text,
    object_detection,
    seq2seq,
    sequence_classification,
    token_classification,
)

__all__ = [
    "causal_lm",
    "diffusion",
    "image_classification",
    "image_text",
    "object_detection",
    "seq2seq",
    "sequence_classification",
    "token_classification",
]
