"""The file of an adapter folder's weights: whether it is one, of its config, with the factors of the method."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from malora_dist.adapters.io.info import CONFIG, WEIGHTS, read_config
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.checkpoint.shards import file_record
from malora_dist.errors import CheckpointError, brief
from malora_dist.files.folder import file_in
from malora_dist.files.tensor_file import TensorPlace, read_header

# No name of a model's layers comes near it.
LONGEST_NAME = 1000


def check_seal(folder: Path) -> None:
    """Raise CheckpointError unless the weights have the SHA-256 that the config was written with, if it holds one."""
    wanted = read_config(folder)["malora"].get("weights_sha256")
    found = None if wanted is None else file_record(folder / WEIGHTS).sha256
    if found != wanted:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged, or not the file that {CONFIG} belongs to: its SHA-256 is {found}, "
            f"malora.weights_sha256 says {wanted}; if you have changed the weights, take that key out of the config"
        )


def weights_header(folder: Path) -> dict[str, TensorPlace]:
    """Read the places of an adapter folder's tensors, by their keys.

    Raises CheckpointError if its file of weights is not a safetensors file in that folder.
    """
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run arbitrary code when it is loaded; only "
            f"{WEIGHTS} is read: save the adapter again as safetensors where you trust it"
        )
    path = file_in(folder, WEIGHTS)
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for key, place in header.items():
        if not place.dtype.is_floating_point:
            raise CheckpointError(
                f"{path}: {brief(key)} is {place.dtype}; the weights of an adapter are floating-point numbers"
            )
    return header


def check_factors(path: Path, spec: MixtureSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless every layer has the tensors of the method, in its shapes, and no other."""
    wanted, layers = dict[str, tuple[int, ...]](), dict[str, dict[str, tuple[int, ...]]]()
    for name, shape in shapes.items():
        if 0 in shape or not name.rpartition(".")[0] or len(name) > LONGEST_NAME:
            raise CheckpointError(f"{path}: {brief(name)} of shape {shape} is not a tensor of an adapter")
        layer, _, factor = name.rpartition(".")
        layers.setdefault(layer, {})[factor] = shape
    for layer, found in layers.items():
        inputs = next((found[name][-1] for name in ("shared_A", "A", "gate") if found.get(name)), 0)
        outputs = found["B"][1] if len(found.get("B", ())) == 3 else 0
        wanted |= {
            f"{layer}.{factor}": shape for factor, shape in factor_shapes(spec.of_layer(layer), inputs, outputs).items()
        }
    check_names(path, wanted, shapes, f"a {spec.method} adapter")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {shapes[name]}, {spec.method} of this config needs {shape}"
            )


def check_names(path: Path, wanted: Iterable[str], found: Iterable[str], whose: str) -> None:
    """Raise CheckpointError unless both hold the same names; `whose` says whose the wanted ones are."""
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        which = f"lacks {brief(missing[0])}" if missing else f"has {brief(unknown[0])}, which {whose} does not have"
        raise CheckpointError(f"{path} {which} ({len(missing)} missing, {len(unknown)} unknown)")
