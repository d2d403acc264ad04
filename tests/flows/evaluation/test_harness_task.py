"""lm-eval is another one inside `patched_harness` alone, and compiles few templates there."""

import logging
import threading
from pathlib import Path

import jinja2
import lm_eval.api.task
import lm_eval.utils
import pytest
import tqdm

from flows.evaluation.harness_task import patched_harness
from flows.evaluation.task_loading import load_tasks
from tests.evaluation_data import FILES, write_items


def is_as_it_was() -> bool:
    return (
        lm_eval.utils.env.from_string == jinja2.Environment.from_string.__get__(lm_eval.utils.env)
        and lm_eval.api.task.tqdm is tqdm.tqdm
        and logging.getLogger("lm_eval.api.task").level == logging.NOTSET
    )


def test_lm_eval_is_patched_while_it_works_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [task] = load_tasks(["piqa"], write_items(tmp_path), None, lambda *_: True, lambda texts: [1] * len(texts))
    assert is_as_it_was()
    task.subtasks["piqa"].build_all_requests()
    assert is_as_it_was()
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError), patched_harness():
        assert not is_as_it_was()
        raise KeyError
    assert is_as_it_was()


def test_threads_do_not_leave_each_other_s_patches(tmp_path: Path) -> None:
    inside, may_end, seen = threading.Event(), threading.Event(), []

    def hold() -> None:
        with patched_harness():
            inside.set()
            may_end.wait(10)

    def follow() -> None:
        with patched_harness():
            seen.append(may_end.is_set())

    threads = [threading.Thread(target=hold), threading.Thread(target=follow)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert seen == [True]
    assert is_as_it_was()


def test_templates_are_compiled_once_and_a_bounded_number_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_template = jinja2.Environment.compile

    def count(environment: jinja2.Environment, source: str, *arguments: object, **options: object) -> object:
        compiled.append(source)
        return compile_template(environment, source, *arguments, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", count)
    write_items(tmp_path, {"boolq.jsonl": FILES["boolq.jsonl"][:1] * 200})
    load_tasks(["boolq"], tmp_path, None, lambda *_: True, lambda texts: [1] * len(texts))
    assert 0 < len(compiled) < 30
    with patched_harness():
        for number in range(2000):
            assert lm_eval.utils.apply_template(f"{number} {{{{a}}}}", {"a": 1}) == f"{number} 1"
        assert lm_eval.utils.env.from_string.cache_info().currsize < 1000
