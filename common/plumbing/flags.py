"""Flags: argument types with their bounds, checks of combinations, and errors in one sentence."""

import argparse
import re
import sys
from math import isfinite

# ---- errors ----------------------------------------------------------------------------------------------


class BadInput(SystemExit):
    """The user's mistake, in one sentence: the flag, file or row, and the remedy.

    The exit status is 2, and there is no traceback.
    """

    def __init__(self, sentence):
        print(f"error: {sentence}", file=sys.stderr)
        super().__init__(2)
        self.sentence = sentence

    def __str__(self):
        return self.sentence


def demand(condition, sentence):
    """Raise BadInput unless the condition holds."""
    if not condition:
        raise BadInput(sentence)


def one_line(error, most=400):
    """An exception's message on one line, or its type if it has none. The part that helps may come last."""
    message = " ".join(str(error).split()) or type(error).__name__
    if len(message) > most:
        message = f"{message[: most // 2]} ... {message[-most // 2 :]}"
    return message.rstrip(".")


# ---- the parser ------------------------------------------------------------------------------------------


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the default of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser(__doc__): described by the first line of a script's docstring; an error is one sentence."""

    def __init__(self, doc):
        description = (doc or "").strip().partition("\n")[0]
        # not abbreviated: the command that a run ends with has the flags as they were given
        super().__init__(description=description, formatter_class=HelpWithDefaults, allow_abbrev=False)

    def error(self, message):
        """Raise BadInput with argparse's message as a sentence that begins with the flag."""
        message = " ".join(message.splitlines())
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message)
        choice = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        bounds = re.fullmatch(r"argument (\S+): (.*: must be .*)", message)
        if unknown:
            raise BadInput(f"{unknown[1]}: there is no such flag; --help lists them all.")
        if choice:
            choices = choice[3].replace("'", "")
            raise BadInput(f"{choice[1]} {choice[2]}: must be one of {choices}.")
        if bounds:  # from one of the types below, which know the value but not the flag
            raise BadInput(f"{bounds[1]} {bounds[2]}.")
        raise BadInput(message.removeprefix("argument ") + ".")


# ---- types -----------------------------------------------------------------------------------------------
#
# add("--lr", type=flags.number(0, 1)): the bounds of a flag are beside the flag. Where a flag has no bounds
# of its own, the default bounds are what int64 and fp32 hold with plenty to spare.


def integer(least=0, most=10**12):
    """The type of a whole number within bounds."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be an integer") from None
        return within(least, most, value, text)

    return parse


def number(least=0, most=1e30):
    """The type of a number within bounds; NaN and infinity are out of any bounds."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a number") from None
        if not isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
        return within(least, most, value, text)

    return parse


def finite(least=-1e30, most=1e30):
    """The type of a number that may be below 0."""
    return number(least, most)


def positive(text):
    """The type of a number above 0."""
    value = finite()(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def within(least, most, value, text):
    """The value, if it is within bounds."""
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {most}")
    return value


steps = integer(0, 10**6 - 1)  # the random draws of step s are seeded with seed * 10**6 + s


class Rate(float):
    """The default of a learning rate: that of the tiny world, and `real`, usual for real models.

    A learning rate that the user gives is a plain float.
    """

    def __new__(cls, tiny, real):
        rate = super().__new__(cls, tiny)
        rate.usual = real
        return rate

    def __str__(self):
        """What --help shows as the default."""
        return f"{float(self):g}, or {self.usual:g} for a real model"


TINY_BUDGET = 100  # the default of --max-new-tokens in every script


def settle_rates(args, is_small):
    """Replace default learning rates by those usual for the model's size, and say what is not replaced."""
    for name, rate in list(vars(args).items()):
        if isinstance(rate, Rate):
            setattr(args, name, float(rate) if is_small else rate.usual)
            if not is_small:
                flag = "--" + name.replace("_", "-")
                sentence = f"{rate.usual:g}, usual for real models; {rate:g} is for the tiny world"
                print(f"{flag} is not given: {sentence}")
    if not is_small and args.max_new_tokens == TINY_BUDGET:
        # the right number depends on the data, so there is no usual one to replace it
        print(f"--max-new-tokens {TINY_BUDGET} is for the tiny world; set it to what your answers need")
    if not is_small and getattr(args, "annotator", None) == "simulated":
        print("--annotator simulated likes short answers, as in the tiny world: docs/methods/rlhf_ppo.md")


# ---- combinations ----------------------------------------------------------------------------------------


def check(args):
    """Check combinations of flags. Each check applies to the scripts that have its flags."""
    given = vars(args)
    budget = args.max_new_tokens

    if "k" in given and not given.get("add_gold"):
        # with --add-gold there are demonstrations to train on, even without a sample
        demand(args.k >= 1, f"--k {args.k}: must be at least 1 without --add-gold.")

    if "pairs" in given and not args.pairs:
        sentence = "a pair is a correct and an incorrect sample; must be at least 2 without --pairs."
        demand(args.k >= 2, f"--k {args.k}: {sentence}")

    if given.get("restart") == "continue":
        sentence = "only --restart base begins a round with it; leave one of them out."
        demand(not args.base, f"--base {args.base}: {sentence}")

    if given.get("reward_model"):
        sentence = "a reward model is given, so none is fitted; leave one of them out."
        demand(not args.preferences, f"--preferences {args.preferences}: {sentence}")
        demand(args.stop_after == "ppo", f"--stop-after {args.stop_after}: {sentence}")

    if "minibatches" in given:
        rows = args.batch_size * args.group_size
        sentence = f"a step has only {rows} completions; lower it."
        demand(args.minibatches <= rows, f"--minibatches {args.minibatches}: {sentence}")

    if "overlong_tokens" in given:
        sentence = f"must be at most --max-new-tokens {budget}."
        demand(args.overlong_tokens <= budget, f"--overlong-tokens {args.overlong_tokens}: {sentence}")

    if given.get("overlong_tokens"):
        sentence = "it divides by the mean reward, which --overlong-tokens can make 0; leave one of them out."
        demand(args.advantage != "maxrl", f"--advantage maxrl: {sentence}")

    if given.get("ratio") == "sequence" and args.loss_norm != "sequence":
        sentence = "GSPO is a mean over responses; without --loss-norm sequence, long ones weigh more"
        print(f"--ratio sequence: {sentence}")

    if "hpt_gate" in given:
        sentence = "must be from 0 to 1, the on-policy accuracy up to which to imitate, or -1 (off)."
        demand(args.hpt_gate >= 0 or args.hpt_gate == -1, f"--hpt-gate {args.hpt_gate:g}: {sentence}")

    if given.get("uft_steps") and args.ratio == "sequence":
        sentence = "the ratio of a response would include its hint, which nobody sampled; use --ratio token."
        demand(args.minibatches * args.epochs_per_batch == 1, f"--ratio sequence: {sentence}")

    if "hybrids" in given:
        most = args.group_size
        reason = f"a group has {args.group_size} completions"
        if args.hpt_gate >= 0:
            most -= 1
            reason += ", and --hpt-gate judges one without a demonstration"
        demand(args.hybrids <= most, f"--hybrids {args.hybrids}: must be at most {most}: {reason}.")

    if "hinted" in given and not args.steps:
        args.hinted = "off"  # nothing is trained, so no demonstration has to be rewritten

    samples_are_demonstrations = given.get("hinted") == "on" or ("k" in given and not given.get("pairs"))
    if samples_are_demonstrations:
        sentence = f"less than --max-new-tokens {budget}, so that samples would lose their end; raise it."
        longest = args.max_demo_tokens
        demand(longest >= budget, f"--max-demo-tokens {longest}: {sentence}")

    if given.get("kl_target"):
        sentence = "it adapts --kl-coef multiplicatively, so --kl-coef must be above 0."
        demand(args.kl_coef, f"--kl-target {args.kl_target}: {sentence}")

    if "eval_first" in given and not args.steps:
        sentence = "with --steps 0 there would be nothing to do; leave one of them out."
        demand(args.eval_first == "on", f"--eval-first off: {sentence}")

    sentence = "the model would not see the question; write {question} where it belongs."
    for name in ("prompt_template", "hint_template", "rationalize"):
        if given.get(name):
            demand("{question}" in given[name], f"--{name.replace('_', '-')}: {sentence}")


def check_mean_score(mean, args):
    """Demand that a reward model's mean score on the initial policy is above that of a truncated response."""
    sentence = f"the mean score is {mean:.2f}, so truncation would be a reward; choose a lower one."
    demand(mean > args.no_eos_score, f"--no-eos-score {args.no_eos_score}: {sentence}")
