"""What somebody may have meant by a linear's name that a model does not have."""

import difflib
from collections.abc import Iterable, Sequence

# Names that families give to linears of the same work; one name may do two works.
WORKS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "q_proj k_proj v_proj query key value q k v wq wk wv qkv_proj query_key_value c_attn qkv Wqkv W_pack in_proj",
        "o_proj out_proj dense c_proj out o wo attn_out att_proj",
        "gate_proj up_proj gate_up_proj gate up fc1 fc_in c_fc w1 w3 wi wi_0 wi_1 dense_h_to_4h ff_proj input_linear",
        "down_proj down fc2 fc_out c_proj w2 wo dense_4h_to_h ff_out output_linear",
    )
)
ALIKE = 0.75


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Return the names of a model that are spelled like `name`, else those of linears that do its work; at most four.

    >>> near_names("qproj", ["q_proj", "k_proj", "v_proj"])
    ['q_proj']
    >>> near_names("q_porj", ["q_proj", "k_proj", "v_proj"])
    ['q_proj']
    >>> near_names("gate_proj", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
    ['fc1']
    """
    leaves = list(dict.fromkeys(names))
    leaf = name.rpartition(".")[2]
    alike = [other for other in leaves if _alike(_stem(leaf), _stem(other))]
    return (alike or _same_work(leaf, leaves))[:4]


def _stem(name: str) -> str:
    """Return a name without what most names share, also where that is misspelled."""
    rest, _, last = name.lower().rpartition("_")
    if rest and difflib.SequenceMatcher(None, last, "proj").ratio() >= ALIKE:
        return rest.replace("_", "")
    return name.lower().replace("_", "").removesuffix("proj")


def _alike(one: str, other: str) -> bool:
    return bool(one) and (one == other or difflib.SequenceMatcher(None, one, other).ratio() >= ALIKE)


def _same_work(leaf: str, leaves: Sequence[str]) -> list[str]:
    works = [names for names in WORKS if leaf in names]
    return [other for other in leaves if any(other in names for names in works)]
