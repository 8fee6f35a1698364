"""What the sweep's page says in words: headline, warnings, what is missing, methods."""

from __future__ import annotations

import math
import re
from collections import Counter
from datetime import UTC, datetime

from jaxlm.report.artifacts import Json, SweepFolder, dicts, number, numbers, part
from jaxlm.report.fitted import approaches
from jaxlm.report.formats import count, fixed, general, percent, power, seconds

PLOTS = "Point at a mark to read its run; follow it to the run's row in the table."

NO_FIGURE = {
    "loss_curves": ("Training loss of every member", "No member has logged two steps yet."),
    "isoflop": ("IsoFLOP parabolas", "No member has finished yet."),
    "optimal_params": ("Compute-optimal parameters", "No approach has given a result yet."),
    "optimal_tokens": ("Compute-optimal tokens", "No approach has given a result yet."),
    "optimal_loss": ("Compute-optimal loss", "No approach has given a result yet."),
    "residuals": ("Predicted against measured", "Needs approach 3, which has no result yet."),
}

UNFIT = ("diverged", "failed")

# The verdict counts a bet as won within this error, or inside the interval.
CLOSE = 0.02


def subtitle(sweep: SweepFolder) -> str:
    done = sum(bool(run.record) for run in sweep.runs)
    said = [f"scaling sweep · {done} of {len(sweep.runs)} members finished"]
    budgets = sorted({run.budget for run in sweep.runs if run.budget and run.role != "holdout"})
    if budgets:
        said.append(
            f"{len(budgets)} compute budgets, {power(budgets[0])} to {power(budgets[-1])} FLOPs"
        )
    return " · ".join(said)


def estimator(sweep: SweepFolder) -> str:
    named = sweep.prediction.get("estimator") or part(sweep.sweep.get("sweep")).get("estimator")
    return str(named or "").replace("approach", "approach ")


def predicted_interval(sweep: SweepFolder) -> list[float] | None:
    return numbers(sweep.prediction.get("ci95"), 2)


def relative_error(sweep: SweepFolder) -> float | None:
    """measured / predicted − 1."""
    predicted, measured = number(sweep.prediction.get("loss")), number(sweep.score.get("measured"))
    return measured / predicted - 1 if predicted and measured else None


def extrapolation(sweep: SweepFolder) -> str:
    target = number(sweep.prediction.get("flops"))
    fitted = [run.budget for run in sweep.runs if run.budget and run.role != "holdout"]
    return f"{target / max(fitted):.2g} × the largest fitted" if target and fitted else ""


def verdict(sweep: SweepFolder) -> tuple[str, str, str]:
    """(class, headline, explanation) of the bet on the held-out run."""
    error, named = relative_error(sweep), estimator(sweep)
    if error is not None:
        inside = sweep.score.get("inside_interval") is True
        wide = sweep.score.get("verdict") == "too wide"
        won = abs(error) <= CLOSE or (inside and not wide)
        title = "✓ The held-out run was predicted" if won else "✗ The held-out run was missed"
        if inside and not won:
            title = "The held-out run lies in an interval too wide to test the law"
        text = (
            f"It came out {percent(abs(error), 2)} {'above' if error > 0 else 'below'} the "
            f"prediction, {'inside' if inside else 'outside'} its 95 % interval. {_made(sweep)}"
        )
        return "good" if won else "bad", title, text
    if number(sweep.prediction.get("loss")) is not None:
        return "", "The bet stands; the held-out run is not measured yet", _made(sweep)
    planned = number(part(sweep.sweep.get("sweep")).get("holdout_flops"))
    if planned:
        by = f"{named} will predict" if named else "It will be predicted"
        text = f"The held-out run has {power(planned)} FLOPs; {by} its loss before it begins."
        return "", "No prediction yet", text
    return "", "No held-out run", "This sweep asks for none, so nothing tests its extrapolation."


def _made(sweep: SweepFolder) -> str:
    """By whom and when the prediction was made."""
    written, named = str(sweep.prediction.get("made_at") or ""), estimator(sweep)
    made = f"Predicted by {named or 'an estimator'}"
    if written:
        made += f", written {written}"
    begun = held_out_start(sweep)
    made += f"; the run began {begun}." if begun else ", before the run began."
    digest = str(sweep.prediction.get("sha256") or "")
    return made + (f" Sha256 of the prediction: {digest[:16]}…" if digest else "")


def held_out_start(sweep: SweepFolder) -> str | None:
    starts = [run.started for run in sweep.runs if run.role == "holdout" and run.started]
    return (
        datetime.fromtimestamp(min(starts), UTC).isoformat(timespec="seconds") if starts else None
    )


def bet_problems(sweep: SweepFolder) -> list[str]:
    """What would make the prediction worthless: written late, or changed after."""
    lines = []
    begun = held_out_start(sweep)
    try:
        written = datetime.fromisoformat(str(sweep.prediction.get("made_at")))
    except ValueError:
        written = None
    if begun and written and written.tzinfo and written > datetime.fromisoformat(begun):
        lines.append(
            f"The prediction was written {written.isoformat()}, after the held-out run began "
            f"({begun}): it is not a prediction."
        )
    scored = sweep.score.get("prediction_sha256")
    if scored and scored != sweep.prediction.get("sha256"):
        lines.append("The prediction was changed after it was scored: its sha256 differs.")
    return lines


def facts(sweep: SweepFolder) -> list[tuple[str, str | None, str]]:
    rows: list[tuple[str, str | None, str]] = []
    for approach in approaches(sweep.fit) if sweep.fit else []:
        ci95 = approach.ci95("a")
        inside = f"95 %: {fixed(ci95[0], 2)} … {fixed(ci95[1], 2)}" if ci95 else "no interval"
        value = fixed(approach.value("a"), 2) if not approach.refused else "–"
        name = f"a, approach {approach.name[-1]}"
        rows.append((name, value, inside if not approach.refused else "no result"))
    noise = noise_floor(sweep)
    rows.append(("Seed noise", fixed(noise, 4), "nats, standard deviation between replicates"))
    spent = [run.number("flops") or 0.0 for run in sweep.runs]
    rows.append(("Compute spent", power(sum(spent)) if any(spent) else None, "training FLOPs"))
    times = [run.number("wall_time_s") or 0.0 for run in sweep.runs]
    rows.append(
        ("Training time", seconds(sum(times)) if any(times) else None, "summed over members")
    )
    return rows if any(row[1] not in (None, "–") for row in rows) else []


def noise_floor(sweep: SweepFolder) -> float | None:
    """Pooled standard deviation of final losses between runs that differ in the seed alone."""
    cells: dict[tuple[object, ...], list[float]] = {}
    for run in sweep.runs:
        loss = run.number("loss")
        if loss is not None and run.role in ("fit", "replicate"):
            cell = (run.budget, run.number("params_effective"), run.number("learning_rate"))
            cells.setdefault(cell, []).append(loss)
    squares = [(v - sum(c) / len(c)) ** 2 for c in cells.values() if len(c) > 1 for v in c]
    freedom = sum(len(c) - 1 for c in cells.values() if len(c) > 1)
    return math.sqrt(sum(squares) / freedom) if freedom else None


def missing(sweep: SweepFolder) -> list[str]:
    """What the page would show but cannot, and why."""
    lines = list(sweep.notices)
    if not sweep.sweep:
        lines.append(
            "sweep.json is missing: the planned members are not known, only those in runs/."
        )
    states = Counter(run.status for run in sweep.runs)
    waiting = {k: n for k, n in states.items() if k in ("running", "waiting")}
    if waiting:
        said = ", ".join(f"{n} {k}" for k, n in waiting.items())
        lines.append(f"The sweep is not finished: {said} of {len(sweep.runs)} members.")
    if not sweep.runs:
        lines.append("No runs yet.")
    if not sweep.fit:
        lines.append("No fit yet: fit.json is written when every member of the fit has finished.")
    elif not sweep.prediction and number(part(sweep.sweep.get("sweep")).get("holdout_flops")):
        lines.append("No prediction yet: prediction.json is written after the fit.")
    return lines


def warnings(sweep: SweepFolder) -> list[str]:
    """The fit's warnings, what it refused and dropped, and members that went wrong."""
    lines = bet_problems(sweep)
    for said in sweep.fit.get("warnings") or []:
        lines.append(re.sub(r"\bapproach([123])\b", r"approach \1", str(said)))
    for approach in approaches(sweep.fit) if sweep.fit else []:
        if approach.refused:
            lines.append(f"{approach.short.capitalize()} refused: {approach.refused}")
        for flops, reason in approach.refused_minima:
            lines.append(
                f"{approach.short.capitalize()}, C = {power(flops) or '?'}: refused: {reason}"
            )
    for row in dicts(sweep.fit.get("dropped")):
        if not str(row.get("reason")).startswith("held out"):
            lines.append(f"{row.get('name')} dropped from the fit: {row.get('reason')}")
    for status in UNFIT:
        names = [run.name for run in sweep.runs if run.status == status]
        if names:
            lines.append(f"{len(names)} {status}: {', '.join(names)}")
    return list(dict.fromkeys(lines))


def methods(sweep: SweepFolder) -> list[str]:
    """Every convention that a reader needs to compare these numbers with others."""
    base: Json = part(part(sweep.sweep.get("sweep")).get("base"))
    data = part(base.get("data"))
    text = [
        "N is the effective parameter count: training FLOPs per token divided by 6, with the "
        "unembedding and the attention scores in. The table also gives N of all parameters and N "
        "without embeddings (the convention of Kaplan et al. 2020). D is the number of training "
        "tokens. C is the training FLOPs, counted from the model's own matrices and not taken as "
        "6ND of some other N. Losses are in nats per token, on held-out documents, at the end of "
        "the run; bits per byte divide by the bytes of the text.",
    ]
    text += recipe(base)
    follows = part(part(sweep.sweep.get("sweep")).get("horizon"))
    if at := number(follows.get("tokens")):
        text.append(
            f"Batch and learning rate follow a run's tokens D, as above at {general(at, 3)}: the "
            f"batch as D^{general(number(follows.get('batch_power')), 3)}, to a factor of 2^k "
            "(Bergsma et al. 2025), the rate as the root of the batch (Malladi et al. 2022) times "
            f"D^{general(number(follows.get('rate_power')), 3)}."
        )
    if halved := part(sweep.sweep.get("sweep")).get("halve"):
        text.append(
            "Of members that differ only in what is varied, the worse half by training loss ended "
            f"at {', '.join(percent(share, 0) or '' for share in halved)} of the steps (successive "
            "halving); no fit reads those."
        )
    if part(sweep.sweep.get("sweep")).get("branches"):
        text.append(
            "Runs of one size and seed share their constant-rate part: each is a cool-down branch "
            "from one trunk (Hägele et al. 2024), and bitwise the run that its own configuration "
            "describes."
        )
    if number(data.get("eval_fraction")):
        text.append(
            f"Held-out text: {percent(data['eval_fraction'], 0)} of the documents, chosen by a "
            f"hash of their text; {count(number(data.get('eval_sequences')))} sequences of it, "
            "the same for every run."
        )
    if sweep.fit.get("convention"):
        resamples = count(number(sweep.fit.get("bootstrap")))
        text.append(
            f"The fit counts N as “{sweep.fit['convention']}” and rests on "
            f"{sweep.fit.get('n', '?')} runs; its 95 % intervals come from "
            f"{resamples or 'no'} resamples."
        )
    text.append(
        "Approach 1 takes the lower envelope of the training curves; approach 2 the minimum of a "
        "parabola in ln N at each compute budget; approach 3 fits L(N, D) = E + A/N^alpha + "
        "B/D^beta by a Huber loss on residuals of ln L (Hoffmann et al. 2022, with the corrections "
        "of Besiroglu et al. 2024). A minimum that its points do not bracket, and a parabola that "
        "opens downwards, are refused."
    )
    if estimator(sweep):
        method = str(sweep.prediction.get("method") or "")
        text.append(
            f"The held-out loss is predicted by {estimator(sweep)}, named in the configuration "
            f"before anything ran. {method}".strip()
        )
    return text


def recipe(base: Json) -> list[str]:
    """How every run is trained, where the sweep varies nothing of it."""
    m, o, t, d = (part(base.get(k)) for k in ("model", "optimizer", "train", "data"))
    if not (m and o and t):
        return []
    kind = str(m.get("parametrization") or "standard")
    names = {"mup": "muP", "completep": "CompleteP"}
    at = f" from width {m.get('base_d_model')}" if kind in names else ""
    at += f" and depth {m.get('base_n_layers')}" if kind == "completep" else ""
    warm, decay = (percent(number(o.get(f"{k}_fraction")), 0) for k in ("warmup", "decay"))
    falls = f", falling over the last {decay}" if o.get("schedule") == "wsd" else ""
    return [
        f"Every run, unless the table says otherwise: {o.get('name')}, peak learning rate "
        f"{general(number(o.get('learning_rate')), 3)}, {names.get(kind, kind)} "
        f"parametrisation{at}; schedule {o.get('schedule')} with {warm} of the steps for warm-up"
        f"{falls}; weight decay {general(number(o.get('weight_decay')), 3)} on matrices, gradients "
        f"clipped at {general(number(o.get('grad_clip')), 3)}; batches of "
        f"{t.get('global_batch_size')} sequences of {m.get('seq_len')} tokens "
        f"({d.get('tokenizer', 'bytes')}, vocabulary {count(number(m.get('vocab_size')))})."
    ]
