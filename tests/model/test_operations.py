"""The operations of a pass, from shapes, against torch's counter on a real pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support.tiny import make_base
from vae_ds.config import ModelConfig
from vae_ds.model import T5VAE, count_operations, extents, skeleton

SHAPE = {"d_model": 48, "d_kv": 8, "d_ff": 80, "num_heads": 5, "num_layers": 3, "num_decoder_layers": 2}
EVERYTHING = ""
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("t5", {}, ()),
    ("v1_1", {}, ()),
    ("t5", {"injection": "none"}, ()),
    ("t5", {"injection": "self_attention", "pooling": "mean", "pool_layers": "all"}, ()),
    ("t5", {"injection": "self_attention+embedding"}, ("t5.encoder",)),
    ("t5", {"injection": "self_attention"}, ("t5.encoder", "t5.shared", "bottleneck")),
    ("t5", {}, ("t5.decoder", "t5.shared", "t5.lm_head")),
    ("v1_1", {"injection": "embedding"}, ("t5.decoder.block", "t5.shared")),
    ("t5", {}, ("t5.shared", "t5.encoder.block.0", "t5.encoder.block.1")),
    ("t5", {}, (EVERYTHING, "bottleneck.mu")),
    ("t5", {"gradient_checkpointing": True}, ()),
    ("t5", {"injection": "self_attention"}, ("t5.decoder", "t5.shared")),
    ("t5", {"lora": {"rank": 4}}, ("LoRA",)),
    ("t5", {"prior": "flow"}, ()),
    ("t5", {"prior": "flow"}, (EVERYTHING, "prior.")),
    ("t5", {"slots": 3, "memory_mlp": 7}, ()),
    ("v1_1", {"slots": 3, "memory_mlp": 7, "lora": {"rank": 4}}, ("LoRA",)),
    ("t5", {"slots": 2}, ("t5.encoder", "t5.shared", "bottleneck")),
    (
        "t5",
        {"injection": "self_attention+embedding", "memory_mlp": 7, "slots": 4},
        ("t5.decoder", "t5.shared", "bottleneck"),
    ),
    ("t5", {"prior": "gaussian"}, ("t5.encoder", "t5.shared", "bottleneck")),
    ("v1_1", {"lora": {"rank": 4, "where": "decoder"}, "injection": "self_attention"}, ("LoRA",)),
]


def counted(model: T5VAE, rows: int, source: int, target: int) -> int:
    ids_BT = torch.randint(3, 50, (rows, source))
    labels_BT = torch.randint(3, 50, (rows, target))
    # The fused kernels of attention compute the scores a second time in the backward pass, which is counted there.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        needs = any(one.requires_grad for name, one in model.named_parameters() if not name.startswith("prior."))
        eps_BL = torch.zeros(rows, model.latent_dim)
        terms = model(ids_BT, torch.ones_like(ids_BT), labels_BT if needs else None, eps_BL)
        loss = terms.rec_B.sum() + terms.kl_BL.sum()
        (loss if model.prior is None else loss - terms.log_p_B.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "settings", "frozen"), CASES)
def test_the_operations_of_a_real_pass(
    family: str, settings: dict[str, Any], frozen: tuple[str, ...], tmp_path: Path
) -> None:
    made = ModelConfig.model_validate({"base": str(make_base(tmp_path, family, **SHAPE)), "latent_dim": 6} | settings)
    model = T5VAE.from_base(made).train()
    if frozen == ("LoRA",):
        names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    elif EVERYTHING in frozen:
        names = {name for name, _ in model.named_parameters() if not name.startswith(frozen[1])}
    else:
        names = {name for name, _ in model.named_parameters() if name.startswith(frozen)} if frozen else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    found = count_operations(model, recomputed=True)
    assert count_operations(skeleton(made), names, recomputed=True) == found
    for rows, source, target in ((1, 7, 7), (3, 5, 11), (2, 13, 4)):
        assert found.of(extents((rows, source), (rows, target))) == counted(model, rows, source, target)


def test_frozen_weights_and_no_second_pass_cost_less(tmp_path: Path) -> None:
    made = ModelConfig(base=str(make_base(tmp_path, "t5", **SHAPE)), latent_dim=6, gradient_checkpointing=True)
    model, sizes = skeleton(made), extents((4, 20), (4, 20))
    decoder = [name for name, _ in model.named_parameters() if name.startswith("t5.decoder")]
    whole = count_operations(model).of(sizes)
    assert count_operations(model, decoder).of(sizes) < whole < count_operations(model, recomputed=True).of(sizes)
