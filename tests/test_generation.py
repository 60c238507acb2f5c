"""What a model's generation config asks for beyond the likeliest token is never passed over."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from flows.errors import JobError
from flows.job import Job
from flows.model import open_model
from stages.generation import RULES, rules_of
from tests.models import write_random_model


def test_every_rule_is_one_of_transformers() -> None:
    known = GenerationConfig().to_dict()  # type: ignore[no-untyped-call]
    assert set(known) >= set(RULES)


def test_neutral_settings_and_those_that_a_job_makes_itself_are_no_rules(tmp_path: Path) -> None:
    assert rules_of(tmp_path) == {}
    settings = {"temperature": 0.7, "top_p": 0.8, "do_sample": True, "eos_token_id": [1, 2]}
    settings |= {"repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None, "min_length": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"num_beams": 4}')
    assert rules_of(tmp_path) == {}


def test_an_old_folders_config_says_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"no_repeat_ngram_size": 3}')
    assert rules_of(tmp_path) == {"no_repeat_ngram_size": 3}


def test_a_rule_is_refused_by_name_unless_the_job_does_without(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=1)
    path = tmp_path / "generation_config.json"
    settings = json.loads(path.read_text()) | {"repetition_penalty": 1.05, "suppress_tokens": [7]}
    path.write_text(json.dumps(settings))

    def job(*ignored: str) -> Job:
        document = {"name": "a", "model": str(tmp_path), "prompts": {"uri": "none"}}
        return Job.model_validate_json(json.dumps(document | {"ignored_rules": ignored}))

    with pytest.raises(JobError, match=r"repetition_penalty 1\.05, suppress_tokens \[7\]"):
        open_model(job())
    with pytest.raises(JobError, match=r"ignored_rules: \[suppress_tokens\]"):
        open_model(job("repetition_penalty"))
    assert open_model(job("repetition_penalty", "suppress_tokens")).vocabulary
