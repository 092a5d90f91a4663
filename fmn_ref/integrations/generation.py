"""Text from a fused causal language model, by Transformers' own generation loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..training import data
from ..training.ensemble import FusedModel

try:
    from transformers import DynamicCache, GenerationMixin
except ImportError as error:
    raise ImportError(f'{error}; pip install "fmn_ref[transformers]"') from error

_LOCK = threading.Lock()  # a loop runs in the first member, which has room for one


def generate(fused: FusedModel, *args: Any, **options: Any) -> Any:
    """Generate text with the members' mixture as the distribution of each next token.

    Each step runs every member once, with a cache of its own. The loop is that of Transformers: greedy search,
    sampling, beams, processors, stopping criteria and streamers act on the mixture.

    Parameters
    ----------
    fused : FusedModel
        Of causal language models, with an adapter of peft or without.
    *args, **options
        As for `generate` of a single network: input_ids, attention_mask, max_new_tokens, ...

    Returns
    -------
    torch.Tensor or ModelOutput
        What `generate` of a single network returns. Logits and scores in it are log-probabilities of the mixture.

    Raises
    ------
    TypeError
        `fused` is not a FusedModel of causal language models.
    ValueError
        Another kind of cache than Transformers' `DynamicCache` is asked for.

    Examples
    --------
    >>> generate(fused, **tokenizer("Once", return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
    """
    if not isinstance(fused, FusedModel):
        raise TypeError(f"fused: expected a FusedModel, got {type(fused).__name__}")
    networks = [_network_of(member) for member in fused.members]
    if options.get("cache_implementation") is not None or options.get("past_key_values") is not None:
        raise ValueError("cache_implementation, past_key_values: each member has a cache of its own; leave them out")
    settings = options.get("generation_config") or networks[0].generation_config
    if options.get("use_cache", settings.use_cache):
        options["past_key_values"] = _MemberCaches(networks[0].config, len(networks))
    with _LOCK:
        hook = networks[0].register_forward_hook(_mixing(fused, networks), with_kwargs=True)
        try:
            return networks[0].generate(*args, **options)
        finally:
            hook.remove()


def _network_of(member: Any) -> Any:
    """The network that generates: a PeftModel's own one, which has the layers of the adapter."""
    network = member.get_base_model() if hasattr(member, "peft_config") else member
    if not isinstance(network, GenerationMixin) or network.config.is_encoder_decoder:
        raise TypeError(f"fused: expected causal language models as members, got {type(network).__name__}")
    return network


def _mixing(fused: FusedModel, networks: list[Any]) -> Callable[..., Any]:
    """Make a hook that turns the first network's logits into those of the mixture."""

    def mix(first: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> Any:
        caches = getattr(inputs.get("past_key_values"), "others", [None] * len(networks))
        calls = dict(zip(fused.members, zip(networks, [None, *caches], strict=False), strict=True))

        def logits(member: nn.Module, batch: None) -> tuple[Tensor, Any]:
            network, cache = calls[member]
            own = output if network is first else network(*args, **(inputs | {"past_key_values": cache}))
            return own.logits, None

        output.logits = data.forward(fused, None, logits)[0]
        return output

    return mix


class _MemberCaches(DynamicCache):
    """Cache of the first member; what the loop does to it, it does to those of the others too."""

    def __init__(self, config: Any, n_members: int) -> None:
        super().__init__(config=config)
        self.others = [DynamicCache(config=config) for _ in range(n_members - 1)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for cache in (super(), *self.others):
            cache.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        for cache in (super(), *self.others):
            cache.crop(tokens_to_remove)
