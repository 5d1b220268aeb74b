"""The planner written down from the equations, candidate by candidate: what the fast one must equal."""

import torch

from m3po.planning import Imagination, MPPIPlanner


class LiteralImagination:
    """Objective (2) by stepping a model, for any model with ``embed``, ``prior``, ``step`` and ``value``."""

    def __init__(self, model, horizon, gamma):
        self.model, self.horizon, self.gamma = model, horizon, gamma

    def refresh(self):
        pass

    def begin(self, start, samples):
        self.start = start

    def roll(self, u, returns, nominal=None, actions=None):
        n, samples = returns.shape
        for i in range(n):
            e = self.model.embed(self.start.task[i : i + 1])
            own = nominal[i] if nominal is not None else None
            for s in range(samples):
                closed = own is None or (nominal is None and s < actions.shape[1])
                chosen, returns[i, s] = self._candidate(i, u[i, s], None if closed else own, e)
                if own is None:
                    own = chosen  # candidate 0 is the unperturbed prior
                if nominal is None and s < actions.shape[1]:
                    actions[i, s] = chosen

    def _candidate(self, i, u, nominal, e):
        start, task = self.start, self.start.task[i : i + 1]
        z, total, alive, discount, chosen = start.z[i : i + 1], 0.0, 1.0, 1.0, []
        for k in range(self.horizon):
            if nominal is not None:
                centre = nominal[k : k + 1]
            elif k == 0:
                centre = start.mu[i : i + 1]
            else:
                centre = self.model.prior(z, e)
                if start.action_mask is not None:
                    centre = centre * start.action_mask[i : i + 1]
            chosen.append(centre + start.sigma[i : i + 1] * u[k])
            z, reward, survives = self.model.step(z, chosen[-1], e, task)
            total = total + discount * alive * reward
            alive, discount = alive * survives, discount * self.gamma
        return torch.cat(chosen), total + discount * alive * self.model.value(z, e)


def literal_planner(model, cfg, gamma, seed):
    return MPPIPlanner(LiteralImagination(model, cfg.horizon, gamma), cfg, seed)


def fast_planner(model, cfg, gamma, seed):
    return MPPIPlanner(Imagination(model, cfg, gamma), cfg, seed)
