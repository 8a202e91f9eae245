"""An agent that searches for a number with a language model's guesses. It knows OpenAI's client, and nothing of rlft.

It runs against any server of chat completions: `python guesser.py` asks the one that OPENAI_BASE_URL names.
"""

import json
import random
import re
import sys

from openai import OpenAI

RULES = "Guess my number. It is a whole number from 1 to {highest}. Answer with one number."


def play(task, base_url=None, api_key=None, model="policy", highest=10, guesses=4):
    """1 where the number is found, and how many guesses it took."""
    client = OpenAI(base_url=base_url, api_key=api_key)
    number = random.Random(task.info["seed"]).randint(1, highest)
    messages: list = [{"role": "user", "content": RULES.format(highest=highest)}]
    for guess in range(1, guesses + 1):
        said = client.chat.completions.create(model=model, messages=messages).choices[0].message
        found = re.search(r"\d+", said.content or "")
        if found and int(found[0]) == number:
            return {"reward": 1.0, "metrics": {"success": 1, "guesses": guess}}
        messages += [said, {"role": "user", "content": hint(found and int(found[0]), number)}]
    return {"reward": 0.0, "metrics": {"success": 0, "guesses": guesses}}


def hint(said, number):
    """What the model is told after a guess that was wrong; said: None where it was no number."""
    if said is None:
        return "That is no number."
    return f"My number is {'higher' if said < number else 'lower'} than {said}."


class Task:
    """What a run gives, for a try without one."""

    def __init__(self, seed):
        self.info = {"seed": seed}


if __name__ == "__main__":
    print(json.dumps(play(Task(int(sys.argv[1]) if len(sys.argv) > 1 else 0))))
