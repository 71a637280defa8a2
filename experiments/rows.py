"""What the study compares: regimes of demonstrations, rows, learning rates, seeds and claims.

This file is the list; experiments/protocol.md says why, and both were committed before the first run.
experiments/study.py runs the rows, experiments/report.py makes tables, verdicts and figures of the records.
"""

from dataclasses import dataclass

# name: flags of the scripts that read demonstrations, levels of the primary number
REGIMES = {
    "answers": ("", "123456"),  # no demonstrations, only answers
    "all": ("", "123456"),  # each question is demonstrated
    "easy": ("--solution-key easy_solution", "456"),  # regime A: levels 1 to 3 are demonstrated
    "few 64": ("--split few_64", "123456"),  # regime B: 64 questions are demonstrated
    "few 16": ("--split few_16", "123456"),
    "noisy": ("--solution-key noisy_solution", "123456"),  # half of the demonstrations are incorrect
}
TUNING_SEEDS = (101, 102)
SEEDS = tuple(range(11, 21))  # the first five of them, or all ten for the main contrasts
SUPERVISED = (2e-4, 4e-4, 9e-4, 2e-3)  # learning rates tried
RL = (1e-4, 2e-4, 4e-4, 8e-4)
LOW = (1e-5, 3e-5, 1e-4, 3e-4)  # of preference losses and of training on own samples
LOWER = (1e-5, 2e-5, 5e-5, 1e-4)  # below the grid of SUPERVISED
SHARES = ((50, 80), (100, 60), (150, 40))  # steps of SFT and of GRPO after it


@dataclass(frozen=True)
class Row:
    """A method in a regime. Its command lacks the learning rate, which is tuned, and the seed."""

    name: str
    regime: str
    command: str
    rates: tuple
    seeds: int = 5
    after_sft: bool = False  # SFT of the same regime comes first, and its share is tuned, too

    @property
    def key(self):
        return f"{self.regime}: {self.name}"


UFT = "luffy.py --uft-steps 60 --hybrids 8 --demo-weight sft --sft-coef 0.001"
FOUR = "--minibatches 4"  # with one update a step no ratio leaves the trust region
GSPO = "--clip-low 3e-4 --clip-high 4e-4"
# 67 steps: resampling makes 1.5 times the tokens
DAPO = "--steps 67 --advantage grpo --loss-norm token --clip-high 0.28 --dynamic-sampling 3"
IDFT, RFT = "idft_hinted.py --hinted", "rft_rejection.py --rounds 2 --steps 100"
EQUAL = "rft_rejection.py --rounds 4 --steps 125"  # 210k tokens generated, 110k trained; GRPO: 196k, 115k


def core(regime, seeds):
    """Prefix-RFT and what it is compared with, GRPO apart: that has no demonstrations."""
    return [
        Row("sft", regime, "sft.py", SUPERVISED, seeds),
        Row("prefix_rft", regime, "prefix_rft.py", RL, seeds),
        Row("sft, then grpo", regime, "grpo.py", RL, seeds, after_sft=True),
        Row("luffy", regime, "luffy.py", RL, seeds),
    ]


# in the order in which they are run
ROWS = [
    Row("grpo", "answers", "grpo.py", RL, 10),
    *core("easy", 10),
    *core("few 64", 10),
    Row("dft", "easy", f"{IDFT} off --weight dft", SUPERVISED),
    Row("dft", "few 64", f"{IDFT} off --weight dft", SUPERVISED),
    Row("sft", "all", "sft.py", SUPERVISED),
    Row("sft, 1,600 demonstrations", "all", "sft.py --steps 100", SUPERVISED),
    Row("dft", "all", f"{IDFT} off --weight dft", SUPERVISED),
    Row("eaft", "all", f"{IDFT} off --weight eaft", SUPERVISED),
    Row("idft", "all", f"{IDFT} off --weight idft", SUPERVISED),
    Row("prefix_rft", "all", "prefix_rft.py", RL),
    *core("noisy", 5),
    *core("few 16", 5),
    Row("prefix_rft, whole prefix", "easy", "prefix_rft.py --prefix-loss all", RL),
    Row("prefix_rft, prefix not trained", "easy", "prefix_rft.py --prefix-loss none", RL),
    Row("prefix_rft, random 20 %", "easy", "prefix_rft.py --prefix-loss random", RL),
    Row("prefix_rft, bottom 20 %", "easy", "prefix_rft.py --prefix-loss bottom", RL),
    Row("prefix_rft, uniform", "easy", "prefix_rft.py --prefix-schedule uniform", RL),
    Row("prefix_rft, 10 % demonstrated", "all", "prefix_rft.py --demo-fraction 0.1", RL),
    Row("prefix_rft, 1 % demonstrated", "all", "prefix_rft.py --demo-fraction 0.01", RL),
    Row("sft, then grpo", "all", "grpo.py", RL, after_sft=True),
    Row("luffy", "all", "luffy.py", RL),
    Row("rft, k = 1", "answers", f"{RFT} --k 1", LOW),
    Row("rft, k = 4", "answers", f"{RFT} --k 4", LOW),
    Row("rft, k = 16", "answers", f"{RFT} --k 16", LOW),
    Row("rft, k = 4, continue", "answers", f"{RFT} --k 4 --restart continue", LOW),
    Row("hinted + sft", "all", f"{IDFT} on --weight sft", SUPERVISED),
    Row("hinted + dft", "all", f"{IDFT} on --weight dft", SUPERVISED),
    Row("hinted + idft", "all", f"{IDFT} on --weight idft", SUPERVISED),
    Row("dpo", "answers", "dpo.py --loss dpo", LOW),
    Row("simpo", "answers", "dpo.py --loss simpo", LOW),
    Row("grpo, std and length", "answers", "grpo.py --advantage grpo --loss-norm sequence", RL),
    # rows that were added later; protocol.md says when
    Row("opsd", "all", "opsd.py", RL),
    Row("opsd", "easy", "opsd.py", RL),
    Row("rl + sft loss", "easy", "luffy.py --demo-weight sft --sft-coef 0.05", RL),
    Row("chord", "easy", "luffy.py --demo-weight chord --sft-coef 0.11", RL),
    Row("srft", "easy", "luffy.py --demo-weight srft --sft-coef 0.05", RL),
    Row("hpt", "easy", "luffy.py --demo-weight sft --sft-coef 0.05 --hpt-gate 0", RL),
    Row("uft", "easy", UFT, RL),
    Row("grpo, four updates", "answers", f"grpo.py {FOUR}", RL),
    Row("gspo", "answers", f"grpo.py --ratio sequence --loss-norm sequence {GSPO} {FOUR}", RL),
    Row("cispo", "answers", f"grpo.py --clip cispo --clip-low 1 --clip-high 4 --loss-norm token {FOUR}", RL),
    Row("dapo", "answers", f"grpo.py {DAPO} {FOUR}", RL),
    Row("maxrl", "answers", "grpo.py --advantage maxrl", RL),
    Row("rft, as many tokens as grpo", "answers", f"{EQUAL} --k 4 --restart continue", LOW),
    # controls, added when the main contrasts had been seen
    Row("idft", "easy", f"{IDFT} off --weight idft", SUPERVISED),
    Row("idft", "few 64", f"{IDFT} off --weight idft", SUPERVISED),
    Row("sft, lower learning rates", "easy", "sft.py", LOWER),
    Row("grpo, same data", "few 64", "grpo.py", RL),
    Row("sft, then grpo, same data", "few 64", "grpo.py --split few_64", RL, after_sft=True),
]
BY_KEY = {row.key: row for row in ROWS}
PREFIX, EASY, FEW = "prefix_rft", "easy", "few 64"


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that would have to hold: (better, worse, number) each."""

    text: str
    source: str
    comparisons: tuple


def over(better, others, number="primary"):
    return tuple((better, other, number) for other in others)


def contrasts(regime):
    others = [f"{regime}: {name}" for name in ("sft", "sft, then grpo", "luffy")]
    return over(f"{regime}: {PREFIX}", [*others, "answers: grpo"])


CLAIMS = [
    Claim("Prefix-RFT is above SFT, GRPO, SFT then GRPO and LUFFY: demonstrations of easy questions",
          "2507.01679: 51.8; 44.1, 45.5, 48.2, 50.1", contrasts(EASY)),
    Claim("Prefix-RFT is above SFT, GRPO, SFT then GRPO and LUFFY: few demonstrations", "", contrasts(FEW)),
    Claim("Prefix-RFT is above GRPO and SFT then GRPO that ask the same questions: few demonstrations", "",
          over(f"{FEW}: {PREFIX}",
               [f"{FEW}: {x}, same data" for x in ("grpo", "sft, then grpo")])),
    Claim("SFT then GRPO is above the methods that mix",
          "2604.23747: 57.0; 51.8 Prefix-RFT, 46.3 LUFFY",
          tuple((f"{regime}: sft, then grpo", f"{regime}: {mixed}", "primary")
                for regime in (EASY, FEW) for mixed in (PREFIX, "luffy"))),
    Claim("RL with or after easy demonstrations is above SFT alone on levels 4 to 6", "",
          over(f"{EASY}: {PREFIX}", [f"{EASY}: sft"]) + over(f"{EASY}: sft, then grpo", [f"{EASY}: sft"])),
    Claim("RL with or after easy demonstrations is above SFT at lower learning rates than the grid's", "",
          tuple((f"{EASY}: {name}", f"{EASY}: sft, lower learning rates", "primary")
                for name in (PREFIX, "sft, then grpo"))),
    Claim("of a prefix, train the tokens of highest entropy: not all, none, random ones or the lowest",
          "2507.01679: 51.8; 45.7 all, 45.4 none",
          over(f"{EASY}: {PREFIX}", [f"{EASY}: {PREFIX}, {x}" for x in
               ("whole prefix", "prefix not trained", "random 20 %", "bottom 20 %")])),
    Claim("a cosine schedule of prefix lengths is above a uniform one", "2507.01679: a figure",
          over(f"{EASY}: {PREFIX}", [f"{EASY}: {PREFIX}, uniform"])),
    Claim("Prefix-RFT with 10 % or 1 % of the demonstrations is above GRPO", "2507.01679: 40.8, 37.6; 30.0",
          tuple((f"all: {PREFIX}, {share} % demonstrated", "answers: grpo", "primary") for share in (10, 1))),
    Claim("half of the demonstrations incorrect: Prefix-RFT is above SFT, SFT then GRPO, LUFFY, and GRPO", "",
          contrasts("noisy")),
    Claim("Prefix-RFT forgets less than SFT", "",
          tuple((f"{r}: {PREFIX}", f"{r}: sft", "side") for r in ("all", EASY, FEW))),
    Claim("Prefix-RFT is above SFT at equal numbers of demonstrations", "",
          over(f"all: {PREFIX}", ["all: sft, 1,600 demonstrations"])),
    Claim("RL raises pass@1", "2402.03300: a figure", over("answers: grpo", ["base"])),
    Claim("Dr. GRPO is above GRPO with 1/std and own lengths, both without KL", "",
          over("answers: grpo", ["answers: grpo, std and length"])),
    Claim("RL is above rejection sampling, at more samples (k = 16) and at fewer (k = 1)", "",
          over("answers: grpo", ["answers: rft, k = 16", "answers: rft, k = 1"])),
    Claim("RL is above rejection sampling, at equal tokens", "",
          over("answers: grpo", ["answers: rft, as many tokens as grpo"])),
    Claim("RFT grows with k, at equal steps", "2308.01825: 41.7 k = 100, 49.3 pooled",
          over("answers: rft, k = 16", ["answers: rft, k = 1"])),
    Claim("continuing from the last round is above starting again", "",
          over("answers: rft, k = 4, continue", ["answers: rft, k = 4"])),
    Claim("DFT is above SFT", "2508.05629: 31.6; 18.0",
          tuple((f"{r}: dft", f"{r}: sft", "primary") for r in ("all", EASY, FEW))),
    Claim("IDFT is above SFT and DFT", "2602.12222: 68; 60, 65, read from a chart",
          over("all: idft", ["all: sft", "all: dft"])),
    Claim("DFT and IDFT are above SFT where SFT leaves room: easy or few demonstrations", "",
          tuple((f"{r}: {name}", f"{r}: sft", "primary") for name in ("dft", "idft") for r in (EASY, FEW))),
    Claim("self-generated targets reduce forgetting: hinted + SFT over SFT", "",
          (("all: hinted + sft", "all: sft", "side"),)),
    Claim("DAPO, GSPO and CISPO are above GRPO, at four updates per step", "",
          over("answers: dapo", ["answers: grpo, four updates"])
          + over("answers: gspo", ["answers: grpo, four updates"])
          + over("answers: cispo", ["answers: grpo, four updates"])),
    Claim("MaxRL is above GRPO", "2602.02710", over("answers: maxrl", ["answers: grpo"])),
    Claim("Prefix-RFT is above other ways to mix: an SFT loss, CHORD, SRFT, HPT, UFT",
          "2507.01679: 51.8; 40.1 with an SFT loss",
          over(f"{EASY}: {PREFIX}", [f"{EASY}: {x}" for x in
               ("rl + sft loss", "chord", "srft", "hpt", "uft")])),
    Claim("self-distillation is above SFT on the same demonstrations", "2601.18734",
          over("all: opsd", ["all: sft"]) + over(f"{EASY}: opsd", [f"{EASY}: sft"])),
    Claim("hinted + IDFT is above DPO and SimPO", "2602.12222: 27.4; 22.4 DPO",
          over("all: hinted + idft", ["answers: dpo", "answers: simpo"])),
]  # fmt: skip
NOT_TESTABLE = {  # what this world cannot answer, and why
    "pass@k at large k": "with 64 tries guessing is enough: a guess that is correct in 1.7 % of the tries "
    "succeeds in 66 % of the cases",
    "incorrect answers stop growing under Dr. GRPO": "responses have 15 tokens and never reach the budget",
    "DAPO's length limit": "the same",
    "IDFT forgets less than SFT": "see experiments/retention.py, which compares at equal pass@1",
}
