"""Recognising quantised checkpoints by their tensors, as configurations may be out of date.

mergekit merges the stored numbers. In a quantised checkpoint those are codes, which give a weight
only together with their scales, so merging them would give nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PretrainedConfig

from mergekit_obim.models.faults import model_fault
from mergekit_obim.models.files import TensorHeader
from mergekit_obim.recipe.faults import Fault

# What GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8, HQQ and quanto store beside a weight, or in
# its place: the last part of a tensor's name, or what follows `.weight.`.
_COMPANIONS = frozenset(
    {
        *("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format", "W_q"),
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "_scale"),
        *("weight_scale", "weight_scale_2", "weight_zero_point", "weight_global_scale"),
        *("weight_packed", "weight_shape", "weight_g_idx", "input_scale", "input_global_scale"),
    }
)
_COMPANION_ENDINGS = ("_scale_inv", "_zero_point", "_zeropoint")
# mxfp4 and AQLM: the names are common ones, so the numbers have to be integers too.
_PACKED_ENDINGS = ("weight", "_blocks", "_packed", "codes", "_data", "_proj")
# Matrices only: position ids, masks and counters are integers in many sound checkpoints.
_PACKED = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})


def quantised(
    label: str, config: PretrainedConfig | None, headers: Mapping[str, TensorHeader] | None
) -> Iterator[Fault]:
    """Yield an error if a model is quantised, or if only its configuration says that it is.

    Args:
        label: What to call the model.
        config: Its configuration; None for bare weight files, which have none.
        headers: Its tensors; None if they are not on this machine, which leaves the configuration.

    Yields:
        One error at most.
    """
    parts = (config, config.get_text_config()) if config else ()
    says = any(getattr(part, "quantization_config", None) for part in parts)
    found = next((n for n, header in (headers or {}).items() if _is_quantised(n, header)), None)
    if headers is None and says:
        what = "its config.json has a quantization_config"
    elif found is not None:
        header = (headers or {})[found]
        what = f"tensor {found} in {header.file} holds {header.dtype}"
    elif says:
        yield model_fault(
            "error",
            f"model {label}: its config.json says that it is quantised, but its tensors hold full "
            "precision: take quantization_config out of its config.json",
        )
        return
    else:
        return
    yield model_fault(
        "error",
        f"model {label}: is quantised, which mergekit cannot merge ({what}): use the "
        "full-precision checkpoint that it was made from",
    )


def _is_quantised(name: str, header: TensorHeader) -> bool:
    last = name.rpartition(".")[2]
    if header.dtype.startswith(("F8", "F6", "F4")):
        return True
    # bitsandbytes: `q_proj.weight.absmax`, `q_proj.weight.quant_state.bitsandbytes__nf4`.
    parts = {last, name.partition(".weight.")[2].partition(".")[0]}
    if parts & _COMPANIONS or last.endswith(_COMPANION_ENDINGS):
        return True
    return header.dtype in _PACKED and len(header.shape) > 1 and last.endswith(_PACKED_ENDINGS)
