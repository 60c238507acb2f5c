"""What the example model is for: short jobs about Python definitions, in plain and in chat form.

Training reads `given` with `answer`; the prompts file holds `given` alone, from files that training
never saw.
"""

import random
import re
from dataclasses import dataclass

from examples.corpus import Definition, Source

DESCRIBE = (
    "Write the first sentence of the docstring for the Python definition below, in the style of "
    "the standard library. Answer with that one sentence and nothing else."
)
FINISH = (
    "Below is how the docstring of a Python definition begins. Finish its first paragraph. "
    "Answer with the missing words and nothing else."
)
NAME = (
    "Below is the docstring of a Python function or class. Find a name that says what it does. "
    "Answer with the name and nothing else."
)
DECLARE = (
    "Below is the docstring of a Python function or class. Write the line that declares it. "
    "Answer with that line and nothing else."
)
INSTRUCTIONS = (DESCRIBE, FINISH, NAME, DECLARE)


@dataclass(frozen=True, slots=True)
class Task:
    """Something given and its answer; without an instruction the answer continues what is given."""

    instruction: str
    given: str
    answer: str

    def plain(self) -> str:
        """The prompt as one text; the answer follows without a further character."""
        if not self.instruction:
            return self.given
        return f"{self.instruction}\n\n{self.given}\n\nAnswer:"

    def plain_answer(self) -> str:
        """The answer as it follows `plain`; led by a space, as words after a colon are."""
        return f" {self.answer}" if self.instruction else self.answer

    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages, the instruction as the system's."""
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": self.given}]


def instructed(found: Definition, rng: random.Random) -> list[Task]:
    """Every instructed task that the definition's docstring allows."""
    words = found.paragraph.split()
    if len(words) < 4:
        return []
    cut = rng.randrange(2, min(len(words), 12))
    begun = " ".join(words[:cut])
    declaration = found.signature.splitlines()[0]
    return [
        Task(DESCRIBE, found.signature, found.sentence),
        Task(FINISH, f'{found.signature}\n    """{begun}', " ".join(words[cut:])),
        Task(NAME, found.paragraph, found.name),
        Task(DECLARE, found.paragraph, declaration),
    ]


def completion(found: Definition, rng: random.Random) -> Task:
    """The definition cut after its signature, a few words further, or at a line's end."""
    signed = len(found.signature)  # every source begins with its signature
    tail = found.source[signed:]
    few_words = [word.end() for word in re.finditer(r"\S+", tail)][:8]
    line_ends = [line.start() for line in re.finditer(r"\n", tail)]
    cuts = rng.choices([[0], few_words, line_ends], weights=[4, 3, 3])[0]
    cut = signed + rng.choice(cuts)
    return Task("", found.source[:cut], found.source[cut:])


def excerpt(source: Source, found: Definition, rng: random.Random) -> Task:
    """The definition's signature after a few lines of what stands before it in its file."""
    lines = source.text.splitlines()
    body = found.line - 1 + len(found.signature.splitlines())
    first = max(0, found.line - 1 - rng.randrange(5, 40))
    rest = len(found.source.splitlines()) - len(found.signature.splitlines())
    return Task("", "\n".join(lines[first:body]), "\n".join(["", *lines[body : body + rest]]))
