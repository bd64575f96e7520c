"""The tuning: sweep on shared passes, attack the best few themselves, choose on one half, measure on the other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from defense import SplitClassifier
from evaluation.attacks import Budget, Effort, attack_by_name, attacks_by_name, check_attack_names
from evaluation.errors import EvaluationError
from evaluation.tuning.adaptive import Reattacked, reattack
from evaluation.tuning.kept import KeptResults, digest_of
from evaluation.tuning.passes import passes_of_a_batch, share_passes
from evaluation.tuning.settings import Setting, grid, variations
from evaluation.tuning.sweep import CLEAN, Rankings, Score, build, pareto_front, sweep, undefended_score

Report = Callable[[str, int, int], None]  # what is under way, how much of it is done, of how much
SELECTION, FINAL = "selection", "final"


@dataclass(frozen=True)
class Plan:
    """What to try, and how hard.

    Attributes:
        values: of each field of ``Setting``, those to combine. limit: at most that many settings, drawn by ``seed``.
        fixed_attacks: attacks of the undefended classifier, whose images all settings are swept on.
        adaptive_attacks: attacks of each candidate itself. effort: of both.
        candidates: settings of the Pareto front that are attacked themselves, those of the best worst case.
        max_clean_loss: what these, and the chosen setting, may lose of clean accuracy against undefended.
        vary: fields that are also varied one at a time around the current setting, each variation attacked itself.
        redraws: of the noise, of which the worst counts.
    """

    budget: Budget
    values: Mapping[str, Sequence[Any]]
    fixed_attacks: Sequence[str]
    adaptive_attacks: Sequence[str]
    effort: Effort = field(default_factory=Effort)
    candidates: int = 3
    max_clean_loss: float = 0.02
    vary: Sequence[str] = ()
    redraws: int = 5
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_attack_names([*self.fixed_attacks, *self.adaptive_attacks])
        if not self.fixed_attacks:
            raise EvaluationError("expected at least one fixed attack: all settings are compared on what it finds")
        if odd := [name for name in self.vary if name not in self.values]:
            raise EvaluationError(f"expected to vary {', '.join(self.values)}; got {', '.join(odd)}")


@dataclass(frozen=True)
class Candidate:
    """A setting that was attacked itself; ``setting`` None is the classifier without a defense.

    Attributes:
        roles: why: ``"front"``, ``"current"``, ``"varied"``, ``"undefended"``.
    """

    setting: Setting | None
    roles: tuple[str, ...]
    found: Reattacked


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        current: the setting of model.toml.
        scores: of all settings on the selection half, under the fixed attacks; undefended_score: without a defense.
        front: those of ``scores`` that no other beats.
        candidates: attacked themselves on the selection half, the undefended classifier first.
        chosen: the candidate with the best worst case there, of those that do not lose too much clean accuracy.
        final: chosen, current and undefended on the other half.
    """

    current: Setting
    scores: list[Score]
    undefended_score: Score
    front: list[Score]
    candidates: list[Candidate]
    chosen: Setting
    final: list[Candidate]


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the selection half and of the final half: a seeded draw, each in order."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return drawn[: count // 2].sort().values, drawn[count // 2 :].sort().values


def tune(
    splits: Mapping[str, SplitClassifier],
    rankings: Rankings,
    current: Setting,
    images: Tensor,
    labels: Tensor,
    plan: Plan,
    report: Report | None = None,
    *,
    kept: KeptResults | None = None,
) -> Tuning:
    """Find the setting with the best worst case.

    Args:
        splits: the classifier split at each layer of the plan and of ``current``; rankings: of (method, layer) pairs.
        images: [n, channels, H, W] in [0, 1]; labels: [n]. One half selects, the other measures.
        report: called with what is under way and how far it is.
        kept: results of candidates that earlier runs attacked.
    """
    select, final = halves(len(labels), plan.seed)
    run = _Run(splits, rankings, plan, report or (lambda what, done, total: None), kept or KeptResults(None))
    selection = run.half(images[select], labels[select])
    scores, undefended = run.sweep(selection, grid(plan.values, limit=plan.limit, seed=plan.seed))
    front = pareto_front(scores)
    lowest_clean = undefended.clean_accuracy() - plan.max_clean_loss
    best = [s.setting for s in front if s.clean_accuracy() >= lowest_clean][: plan.candidates]
    candidates = run.candidates(selection, _roles(current, best, plan), SELECTION)
    chosen = _best(candidates, lowest_clean) or current
    measured = run.candidates(
        run.half(images[final], labels[final]), {None: ["undefended"], chosen: ["chosen"], current: ["current"]}, FINAL
    )
    return Tuning(current, scores, undefended, front, candidates, chosen, measured)


def _roles(current: Setting, best: Sequence[Setting], plan: Plan) -> dict[Setting | None, list[str]]:
    """Whom to attack, and why."""
    roles: dict[Setting | None, list[str]] = {None: ["undefended"], current: ["current"]}
    for setting in best:
        roles.setdefault(setting, []).append("front")
    for varied in variations(current, {name: plan.values[name] for name in plan.vary}):
        if "varied" not in roles.setdefault(varied, []):
            roles[varied].append("varied")
    return roles


def _best(candidates: Iterable[Candidate], lowest_clean: float) -> Setting | None:
    """Of those that do not lose too much clean accuracy, the one of the best worst case; the first of equals."""

    def accuracies(candidate: Candidate) -> tuple[float, float]:
        return float(candidate.found.robust.float().mean()), float(candidate.found.clean.mean())

    allowed = [c for c in candidates if c.setting and float(c.found.clean.mean()) >= lowest_clean]
    return max(allowed, key=accuracies).setting if allowed else None


@dataclass(frozen=True)
class _Part:
    """The progress of one of several parts, reported as that of the whole."""

    report: Report
    what: str
    before: int
    total: int

    def __call__(self, done: int) -> None:
        self.report(self.what, self.before + done, self.total)


@dataclass(frozen=True)
class _Half:
    images: Tensor
    labels: Tensor
    fixed: dict[str, Tensor]


@dataclass(frozen=True)
class _Run:
    splits: Mapping[str, SplitClassifier]
    rankings: Rankings
    plan: Plan
    report: Report
    kept: KeptResults

    @property
    def undefended(self) -> SplitClassifier:
        return next(iter(self.splits.values()))

    def half(self, images: Tensor, labels: Tensor, batch_size: int = 128) -> _Half:
        """These images with the fixed attacks on the undefended classifier."""
        plan, fixed, total = self.plan, {}, len(self.plan.fixed_attacks) * len(images)
        for number, name in enumerate(plan.fixed_attacks):
            attack, parts = attack_by_name(name, plan.effort), []
            for first in range(0, len(images), batch_size):
                batch = slice(first, first + batch_size)
                parts.append(attack(self.undefended, images[batch], labels[batch], plan.budget, seed=plan.seed + first))
                done = number * len(images) + min(first + batch_size, len(images))
                self.report("attacking the undefended model", done, total)
            fixed[name] = torch.cat(parts)
        return _Half(images, labels, fixed)

    def sweep(self, half: _Half, settings: Sequence[Setting]) -> tuple[list[Score], Score]:
        """All settings, and the undefended classifier, on the shared passes."""
        plan, batch_size = self.plan, 256
        draws = plan.redraws * max(s.num_noise_samples for s in settings)
        sigmas = sorted({s.sigma for s in settings})
        shown = {CLEAN: half.images} | half.fixed
        a_version = -(-len(half.labels) // batch_size) * passes_of_a_batch(len(self.splits), sigmas, draws)
        versions = {}
        for number, (name, images) in enumerate(shown.items()):
            versions[name] = share_passes(
                self.splits,
                images,
                half.labels,
                sigmas=sigmas,
                draws=draws,
                seed=plan.seed,
                batch_size=batch_size,
                progress=_Part(
                    self.report, "passes that all settings share", number * a_version, len(shown) * a_version
                ),
            )
        scores = sweep(
            settings,
            self.splits,
            self.rankings,
            versions,
            redraws=plan.redraws,
            progress=lambda done: self.report("settings", done, len(settings)),
        )
        return scores, undefended_score(settings[0], versions)

    def candidates(self, half: _Half, roles: Mapping[Setting | None, Sequence[str]], which: str) -> list[Candidate]:
        """Attack each of them itself."""
        each, found = len(self.plan.adaptive_attacks) * len(half.labels), []
        for number, (setting, why) in enumerate(roles.items()):
            under_way = _Part(self.report, f"attacking candidates ({which} half)", number * each, len(roles) * each)
            found.append(Candidate(setting, tuple(why), self._candidate(setting, half, under_way)))
            under_way(each)
        return found

    def _candidate(self, setting: Setting | None, half: _Half, progress: Callable[[int], None]) -> Reattacked:
        plan = self.plan

        def attack() -> Reattacked:
            return reattack(
                build(setting, self.splits, self.rankings) if setting else self.undefended,
                half.images,
                half.labels,
                plan.budget,
                attacks_by_name(plan.adaptive_attacks, plan.effort),
                half.fixed,
                redraws=plan.redraws,
                seed=plan.seed,
                progress=progress,
            )

        return self.kept.get_or_compute(self._deciding(setting, half), attack)

    def _deciding(self, setting: Setting | None, half: _Half) -> dict[str, object]:
        """All that a candidate's result depends on."""
        plan = self.plan
        scores = [self.rankings[setting.method, setting.layer].scores] if setting else []
        return {
            "setting": asdict(setting) if setting else None,
            "model": self.undefended.model_digest,
            "tensors": digest_of(half.images, half.labels, *half.fixed.values(), *scores),
            "plan": [asdict(plan.budget), list(plan.adaptive_attacks), asdict(plan.effort), plan.redraws, plan.seed],
        }
