"""Weights to begin with: those of another checkpoint, as far as they fit (fine-tuning)."""

from pathlib import Path

from torch import Tensor

from stablevm.errors import UserError
from stablevm.snapshot import ModelCard, Weights, load_card, load_weights

LABEL_TABLE = "y_embedder.embedding_table.weight"
# Fields of the network and of its latents that decide what each weight means.
NETWORK_FACTS = (
    "input_size", "in_channels", "patch_size", "depth", "hidden_size", "num_heads", "mlp_ratio", "qk_norm",
    "time_scale",
)  # fmt: skip
LATENT_FACTS = ("shape", "scale", "shift")
RUN_FACTS = ("path_type", "prediction")
PROJECTOR_FACTS = ("projector_dims", "projector_kind", "projector_hidden", "encoder_depth")


def initial_weights(
    folder: Path, weights: Weights, card: ModelCard, fresh: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the checkpoint in `folder` for the network of `card`, and lines that say what they leave out.

    With another number of classes the labels' rows are the `fresh` ones, but for the null class's; projectors are fresh
    unless the checkpoint's read the same block for encoders of the same widths. UserError for a checkpoint that can't
    be read, and naming both values where it differs in anything else.
    """
    theirs = load_card(folder)
    _check_same(folder, theirs, card)
    found = load_weights(folder, weights)
    start = {name: found.get(name, value) for name, value in fresh.items()}
    lines = [f"starting from the weights {weights} of {folder}, step {theirs.step:,}"]
    if not theirs.latent.has_autoencoder_of(card.latent):
        lines.append(f"its autoencoder was {theirs.latent.autoencoder}, this run's is {card.latent.autoencoder}")
    if theirs.model.num_classes != card.model.num_classes:
        start[LABEL_TABLE] = fresh[LABEL_TABLE].clone()
        start[LABEL_TABLE][card.model.null_class] = found[LABEL_TABLE][theirs.model.null_class]
        lines.append(
            f"labels begin anew: {card.model.num_classes:,} classes instead of {theirs.model.num_classes:,}; "
            "the null class is taken over"
        )
    if card.model.projector_dims and any(
        getattr(theirs.model, fact) != getattr(card.model, fact) for fact in PROJECTOR_FACTS
    ):
        start |= {name: value for name, value in fresh.items() if name.startswith("projectors.")}
        had = "none" if not theirs.model.projector_dims else "others"
        lines.append(f"projectors begin anew: the checkpoint has {had}")
    return start, lines


def _check_same(folder: Path, theirs: ModelCard, ours: ModelCard) -> None:
    for facts, one, other in (
        (NETWORK_FACTS, theirs.model, ours.model),
        (LATENT_FACTS, theirs.latent, ours.latent),
        (RUN_FACTS, theirs, ours),
    ):
        for fact in facts:
            if getattr(one, fact) != getattr(other, fact):
                what = f"latent's {fact}" if facts is LATENT_FACTS else fact.replace("_", " ")
                raise UserError(
                    f"--init-from {folder}: its {what} is {getattr(one, fact)}, this run's is {getattr(other, fact)}; "
                    "give the model, data and options of that checkpoint"
                )
