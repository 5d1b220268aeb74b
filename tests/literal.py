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


def literal_plan(model, cfg, gamma, z, mu, sigma, task, noise, action_mask=None):
    """One environment's plan from (2) and algorithm.md 4(e), in the precision of its inputs.

    ``noise`` is a list of (S, H, A) per iteration. Returns the first action's mean and the gain.
    """
    mask = torch.ones_like(mu) if action_mask is None else action_mask.to(mu.dtype)
    mu, sigma = mu * mask, sigma * mask
    e = model.embed(task)

    def rollout(actions=None, u=None):
        """Return and actions: given ones, or the prior's own, perturbed by ``u``."""
        state, total, alive, chosen = z, 0.0, 1.0, []
        for k in range(cfg.horizon):
            centre = mu if k == 0 else model.prior(state, e) * mask
            a = actions[k] if actions is not None else centre + sigma * u[k]
            chosen.append(a)
            state, reward, survives = model.step(state, a, e, task)
            total = total + gamma**k * alive * reward
            alive = alive * survives
        return total + gamma**cfg.horizon * alive * model.value(state, e), torch.stack(chosen)

    nominal_return, nominal = rollout(u=torch.zeros_like(noise[0][0]))
    mean, std = torch.zeros_like(nominal), torch.ones_like(nominal)
    own = []  # the prior's noisy trajectories: perturbation and return, evaluated once
    for iteration in range(cfg.num_iterations):
        candidates = []
        for s in range(cfg.num_samples):
            u = (mean + std * noise[iteration][s]).clamp(-cfg.max_noise, cfg.max_noise) * mask
            if s >= cfg.num_prior_samples:
                candidates.append((u, rollout(actions=nominal + sigma * u)[0]))
            elif iteration == 0:
                value, actions = rollout(u=u)
                u = ((actions - nominal) / sigma.clamp_min(1e-6)).clamp(-cfg.max_noise, cfg.max_noise)
                own.append((u, value))
        candidates = own + candidates
        returns = torch.stack([value for _, value in candidates])
        spread = returns.std(unbiased=False)
        score = (returns - returns.mean()) / spread
        best = sorted(range(len(candidates)), key=lambda s: -score[s].item())[: cfg.num_elites]
        weight = torch.stack([(cfg.temperature * score[s]).exp() for s in best])
        weight = weight / weight.sum()
        mean = sum(w * candidates[s][0] for w, s in zip(weight, best, strict=True))
        variance = sum(w * (candidates[s][0] - mean) ** 2 for w, s in zip(weight, best, strict=True))
        std = variance.sqrt().clamp(cfg.min_std, 1.0)
    plan_return, _ = rollout(actions=nominal + sigma * mean)
    return mu + sigma * mean[0], (plan_return - nominal_return) / spread


def literal_planner(model, cfg, gamma, seed):
    return MPPIPlanner(LiteralImagination(model, cfg.horizon, gamma), cfg, seed)


def fast_planner(model, cfg, gamma, seed):
    return MPPIPlanner(Imagination(model, cfg, gamma), cfg, seed)
