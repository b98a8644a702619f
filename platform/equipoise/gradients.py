"""How strongly each term of the objective pulls at each network.

Knows how a term's gradient is taken without leaving a trace in what is trained; must not know what is made of the
norms (`balance`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from equipoise.balance import weights
from equipoise.losses import cycle
from equipoise.nets import Sifa
from equipoise.objective import cycle_terms, fool_predictions, segmentation_terms
from equipoise.referee import Referee
from equipoise.speed import autocast
from equipoise.step import Batch, Images, Signals, forward


def measure(net: Sifa, batch: Batch, referee: Referee) -> dict[str, dict[str, float]]:
    """Measure on a batch, at the weights as they are; the device is waited for.

    Args:
        net: in training mode; neither it nor any random number is changed.
        batch: this rank's share.
        referee: the rules of the games, the run's configuration and its ranks.

    Returns:
        A network -> a term -> the norm, over all of the network's weights, of the gradient of that term's unweighted
        loss, averaged over ranks: for every network and term that `balance.weights` names. With the cycles, also
        `cycles`: of the gradient of their sum. Not finite where a gradient is not. The same on all ranks.
    """
    movers: dict[str, list[str]] = {}
    for network, terms in weights(referee.config).items():
        for name in terms:
            movers.setdefault(name, []).append(network)
    norms: dict[tuple[str, str], Tensor] = {}
    first: dict[str, list[Tensor]] = {}
    with _traceless(net):
        terms_of_batch = _terms(net, batch, referee)
        for name, networks in movers.items():
            found = _gradients(terms_of_batch[f"loss/{name}"], net, networks, referee)
            norms |= {(network, name): _norm(found[network]) for network in networks}
            if name == "cycle_s":
                first = found
            elif name == "cycle_t":
                both = {network: torch._foreach_add(first.pop(network), found[network]) for network in networks}
                norms |= {(network, "cycles"): _norm([*sums]) for network, sums in both.items()}
    told = torch.stack(list(norms.values())).tolist() if norms else []
    by_network: dict[str, dict[str, float]] = {network: {} for network, _ in norms}
    for (network, name), norm in zip(norms, told, strict=True):
        by_network[network][name] = norm
    return by_network


@contextmanager
def _traceless(net: Sifa) -> Iterator[None]:
    """Afterwards buffers (running statistics, vectors of spectral norms) and random numbers are as they were."""
    buffers = list(net.buffers())
    kept = [buffer.clone() for buffer in buffers]
    device = next(net.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, was in zip(buffers, kept, strict=True):
                buffer.copy_(was)


def _terms(net: Sifa, batch: Batch, referee: Referee) -> Signals:
    """Every term of the objective but those of critics, unweighted, on one graph."""
    config, see, fool = referee.config, referee.shown, referee.fool
    with autocast(config.speed, batch.source.device):
        made = forward(net, batch.source, batch.target)
        on_st, on_ts = net.critic_t(see(made.st)), net.critic_s(see(made.ts))
        terms = cycle_terms(batch, made.sts, made.tst)
        terms["loss/adv_t"] = fool(on_st, lambda: net.critic_t(see(batch.target)))
        terms["loss/adv_s"] = fool(on_ts[:, :1], lambda: net.critic_s(see(batch.source))[:, :1])
        if config.loss.identity:
            terms["loss/identity"] = cycle(batch.target, net.generator(batch.target))
        if config.loss.segmentation == 0:  # CycleGAN
            return terms
        terms["loss/adv_aux"] = fool(on_ts[:, 1:], lambda: net.critic_s(see(made.sts))[:, 1:])
        terms |= _games_of_predictions(net, made, referee)
    total = referee.ranks.total
    return terms | segmentation_terms(made.logits_st, made.low_st, batch.label, config.loss, total)


def _games_of_predictions(net: Sifa, made: Images, referee: Referee) -> Signals:
    terms = {"loss/adv_p": fool_predictions(net.critic_p, made.logits_t, made.logits_st, referee)}
    if net.critic_p_low is not None and made.low_st is not None and made.low_t is not None:
        terms["loss/adv_p_low"] = fool_predictions(net.critic_p_low, made.low_t, made.low_st, referee)
    return terms


def _gradients(loss: Tensor, net: Sifa, networks: Sequence[str], referee: Referee) -> dict[str, list[Tensor]]:
    """The mean over ranks of a loss's gradient by each network's weights; 0 where it does not reach."""
    own = {network: list(getattr(net, network).parameters()) for network in networks}
    every = [p for parameters in own.values() for p in parameters]
    found = torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(every, found, strict=True)]
    mean = iter(referee.ranks.average(filled))
    return {network: [next(mean) for _ in parameters] for network, parameters in own.items()}


def _norm(gradients: list[Tensor]) -> Tensor:
    norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
    return norm
