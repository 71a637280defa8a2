"""Records as the study writes them, made up: for reports of a study that is finished, or half done."""

import random
from functools import cache

from experiments import study
from experiments.rows import BY_KEY, ROWS, SEEDS, TUNING_SEEDS

LEVEL = {  # about the primary number of a row, by regime and beginning of its name
    "answers": {"grpo": 0.63, "rft": 0.55, "dpo": 0.48, "simpo": 0.45},
    "all": {"hinted": 0.75, "idft": 0.42, "luffy": 0.97},
    "easy": {"sft": 0.3, "dft": 0.33, "luffy": 0.36},
    "few 64": {"sft": 0.8, "dft": 0.8, "luffy": 0.6},
    "few 16": {"sft": 0.6, "luffy": 0.58, "prefix_rft": 0.75},
    "noisy": {"sft": 0.7, "luffy": 0.6, "prefix_rft": 0.7},
}


def level_of(row):
    found = [y for x, y in LEVEL[row.regime].items() if row.name.startswith(x) and not row.after_sft]
    return found[0] if found else 0.95


def shares(generator, middle, spread):
    """One number for each level: harder ones lower."""
    near = [middle + 0.06 * (3 - i) * (1 - middle) for i in range(6)]
    return [round(min(1, max(0, generator.gauss(x, spread))), 4) for x in near]


def measured(generator, middle, spread):
    side = round(generator.gauss(0.85, 0.02), 4)
    found = {"test@0.6": shares(generator, middle, spread), "test@1": shares(generator, 0.9 * middle, spread)}
    found |= {"test@0": shares(generator, min(1, middle + 0.1), spread), "pass@8": 0.97}
    found |= {"length": 15 + 35 * (middle > 0.65), "truncated": 0.0, "side@0.6": side}
    return found | {"harder@0.6": 0.04, "kl": round(generator.uniform(0.05, 0.25), 4), "entropy": 0.2}


def base():
    record = {"row": "base", "phase": "final", "seed": 0, "lr": None, "share": None}
    return record | measured(random.Random(0), 0.38, 0.0)


def curve(generator, row):
    """Of RL: [step, reward, entropy, length, reward of hybrids]; some rows adopt the demonstrated format."""
    adopts = level_of(row) > 0.65 and row.regime != "answers"
    at = generator.choice([25, 30, 40]) if adopts else 1000
    points = []
    for step in range(5, 101, 5):
        reward = 0.35 + 0.2 * step / 100 + 0.3 * (step >= at)
        hybrid = None if row.command.startswith("grpo") else 0.9
        noise = [generator.gauss(0, 0.02) for _ in range(2)]
        points.append(
            [step, round(reward + noise[0], 4), 0.2, 15 + 33 * (step >= at) + 10 * noise[1], hybrid]
        )
    return points


def runs_of(row, records, seeds):
    """All tuning runs and the final ones of so many seeds, by the tasks of the study itself."""
    found = [x for x in records if x["row"] == f"{row.regime}: sft"]  # its learning rate is needed
    before = len(found)
    while True:
        tasks = study.tasks(found, row)
        todo = [task for task in tasks if task[0] == "tune" or task[2] in SEEDS[:seeds]]
        if not todo:
            return found[before:]
        found += [one_run(row, found, *task) for task in todo]


def one_run(row, records, phase, option, seed):
    share, rate = option
    generator = random.Random(f"{row.key} {phase} {option} {seed}")
    record = {
        "row": row.key,
        "phase": phase,
        "seed": seed,
        "lr": rate,
        "share": list(share) if share else None,
    }
    record |= {"commands": study.stages(records, row, option), "commit": "", "versions": {}}
    record |= {
        "tokens_generated": generator.randrange(1, 6) * 100_000,
        "tokens_trained": 200_000,
        "cpu": 60.5,
    }
    if row.command.startswith(("sft", "idft_hinted.py --hinted off")):
        record["tokens_generated"] = 0
    if phase == "tune":
        middle = level_of(row) - 0.1 * abs(row.rates.index(rate) - 1)
        return record | {"primary": round(generator.gauss(middle, 0.02), 4)}
    is_rl = row.command.startswith(("grpo", "prefix_rft", "luffy"))
    record["curve"] = curve(generator, row) if is_rl else []
    return record | measured(generator, level_of(row), 0.02)


@cache
def study_of(*keys, seeds=10):
    """The base and these rows; "sft, then grpo" needs SFT of its regime."""
    records = [base()]
    for row in [BY_KEY[key] for key in keys] or ROWS:
        records += runs_of(row, records, min(seeds, row.seeds))
    return tuple(records)


def everything():
    """Every row, SFT before what continues it."""
    return list(study_of(*(row.key for row in sorted(ROWS, key=lambda row: row.after_sft))))


assert len(TUNING_SEEDS) == 2  # the records above have both
