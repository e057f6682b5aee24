"""Tasks of local data: prompts as lm-eval has them, and archives that mean harm."""

import gzip
import io
import json
import lzma
import pathlib
import random
import re
import sys
import tarfile
import types

import pytest

from experiments import held_out
from moejax.errors import InputError
from moejax.evaluation import compare as eval_compare
from moejax.evaluation import sandbox
from moejax.evaluation import tasks as eval_tasks
from moejax.evaluation.tasks import readers, texts
from moejax.text import Tokenizer

QUESTION = 'What is "two", plus, two? \nReally?'
ROWS = {
    "dev": [f"Example {i},a{i},b{i},c{i},d{i},{'ABCDA'[i]}" for i in range(5)],
    "val": ["Never asked,1,2,3,4,A"],
    "test": ['"What is ""two"", plus, two? \nReally? ",3,4,"5, five",6,B', "Second,w,x,y,z,D"],
}
GAOKAO = {
    "2010-2022_Biology_MCQs": [{"question": "问？\n", "answer": ["C"], "index": 0}],
    "2010-2022_Physics_MCQs": [{"question": "力？", "answer": ["AC"], "index": 4}],
    "2012-2022_English_Cloze_Test": [{"question": "Fill", "answer": ["G", "A"], "index": 1}],
}
MBPP = [
    {
        "text": f"Do {i}.",
        "code": f"x = {i}\r\n",
        "task_id": i,
        "test_list": [f"assert {i} + {j}" for j in range(4)],
    }
    for i in (1, 2, 3, 4, 10, 11, 510, 511)
]
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """Doubles."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
PAGES = [
    "One = \n \n It 's 3 @.@ 5 ( see below ) . \n",
    "Two = \n = = Part = = \n 20 ° N <unk> ; \n",
]


def archive(path, members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    path.write_bytes(lzma.compress(buffer.getvalue()))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """A small copy of every data set."""
    splits = [
        (f"{split}/{subject}_{split}.csv", "\n".join(rows).encode())
        for split, rows in ROWS.items()
        for subject in ("world_history", "anatomy")
    ]
    archive(folder / "mmlu_dev_val_test.tar.xz", splits)
    questions = [
        (f"Data/Objective_Questions/{name}.json", json.dumps({"example": rows}).encode())
        for name, rows in GAOKAO.items()
    ]
    archive(folder / "gaokao_bench_Data.tar.xz", [*questions, ("Data/README", b"not read")])
    for split, count in (("test", 2), ("train", 9)):
        rows = [
            {"question": f"{split} {i}?", "answer": f"Think.\n#### {i},000"} for i in range(count)
        ]
        (folder / f"gsm8k_{split}.jsonl.xz").write_bytes(lzma.compress(lines(rows)))
    (folder / "mbpp.jsonl").write_bytes(lines(MBPP))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines([HUMANEVAL])))
    text = " \n" + "".join(f" = {page}" for page in PAGES)
    (folder / "wikitext2_test.txt.xz").write_bytes(lzma.compress(text.encode()))
    turns = [
        {"question_id": i, "category": f"c{i % 2}", "turns": [f"Say {i}", "Again"][: 1 + (i == 1)]}
        for i in range(4)
    ]
    (folder / "spec_bench_question.jsonl").write_bytes(lines(turns))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_mmlu_is_asked_as_lm_eval_asks_it(data):
    task = eval_tasks.load("mmlu", data, shots=2)
    assert [item.id for item in task.items] == [
        *("anatomy/0", "world_history/0", "anatomy/1", "world_history/1")
    ]
    assert task.items[1].prompt == (
        "The following are multiple choice questions (with answers) about world history.\n\n"
        "Example 0\nA. a0\nB. b0\nC. c0\nD. d0\nAnswer: A\n\n"
        "Example 1\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer: B\n\n"
        'What is "two", plus, two? \nReally?\nA. 3\nB. 4\nC. 5, five\nD. 6\nAnswer:'
    )
    assert task.items[1].choices == (" A", " B", " C", " D")
    assert [item.target for item in task.items] == [1, 1, 3, 3]
    assert "Example" not in eval_tasks.load("mmlu", data, limit=1).items[0].prompt


def test_gsm8k_draws_its_examples_as_lm_eval_does(data):
    items = eval_tasks.load("gsm8k", data).items
    rng = random.Random(1234)
    for i, item in enumerate(items):
        drawn = rng.sample(range(9), 5)
        shown = "".join(f"Question: train {n}?\nAnswer: Think.\n#### {n},000\n\n" for n in drawn)
        assert item.prompt == f"{shown}Question: test {i}?\nAnswer:"
        assert item.gold == f" Think.\n#### {i},000"
    assert items[0].until == ("Question:", "</s>", "<|im_end|>")
    assert items[1].grade("so 1000 or #### 1,000.") == {"strict": 1.0, "flexible": 1.0}
    assert items[1].grade("#### 7 then $1,000") == {"strict": 0.0, "flexible": 1.0}
    assert items[1].grade("none at all") == {"strict": 0.0, "flexible": 0.0}
    assert items[1].grade("#### 1000 and then 5") == {"strict": 1.0, "flexible": 0.0}


def test_programs_are_asked_for_and_tested_as_lm_eval_does(data):
    [item] = eval_tasks.load("humaneval", data).items
    assert (item.prompt, item.gold) == (HUMANEVAL["prompt"], HUMANEVAL["canonical_solution"])
    whole = HUMANEVAL["prompt"] + "    return 1\n" + HUMANEVAL["test"] + "\ncheck(f)"
    assert item.program("    return 1") == whole
    first, last = eval_tasks.load("mbpp", data).items
    assert (first.id, last.id) == ("11", "510")
    asked = "You are an expert Python programmer, and here is your task:"
    tests = [f"assert {{0}} + {j}\n" for j in range(3)]
    shown = "".join(
        f"{asked} Do {n}. Your code should pass these tests:\n\n{''.join(tests).format(n)}[BEGIN]\n"
        f"x = {n}\r\n\n[DONE]\n\n"
        for n in (2, 3, 4)
    )
    end = (
        f"{asked} Do 11. Your code should pass these tests:\n\n{''.join(tests).format(11)}[BEGIN]\n"
    )
    assert first.prompt == shown + end
    assert first.program("pass") == "pass\n" + "".join(tests).format(11).rstrip()


def test_wikitext_is_cleaned_as_lm_eval_cleans_it(data):
    first, second = eval_tasks.load("wikitext", data).items
    assert first.text == " = One =\n\nIt's 3.5 (see below).\n"
    assert second.text == " = Two =\n== Part ==\n20°N <unk>;\n"
    page = f" = {PAGES[0]}"
    assert first.words == len(re.split(r"\s+", page)) and first.bytes == len(page.encode())
    assert "<unk>" in eval_tasks.load("wikitext", data).note


def test_gaokao_has_an_item_for_every_answer(data):
    items = eval_tasks.load("gaokao", data).items
    found = {item.id: (item.choices[item.target], len(item.choices)) for item in items}
    assert found == {
        "2010-2022_Biology_MCQs/0/0": ("C", 4),
        "2010-2022_Physics_MCQs/4/0": ("AC", 15),
        "2012-2022_English_Cloze_Test/1/0": ("G", 7),
        "2012-2022_English_Cloze_Test/1/1": ("A", 7),
    }
    assert items[-1].prompt == "Fill\n第2小题答案：" and items[0].prompt == "问？\n答案："


def test_spec_bench_takes_its_categories_in_turn(data):
    items = eval_tasks.load("spec_bench", data, limit=3).items
    assert [item.prompt for item in items] == ["Say 0", "Say 1", "Say 2"]
    assert all(not item.gold and item.max_new_tokens == 1024 for item in items)
    assert [item.turns for item in items] == [("Say 0",), ("Say 1", "Again"), ("Say 2",)]


def test_windows_of_wikitext_are_cut_from_the_whole_text(data):
    task = eval_tasks.load("wikitext_windows", data, limit=2)
    whole = " \n" + "".join(f" = {page}" for page in PAGES)
    [item] = task.items
    assert (item.text, item.window, task.window, task.limit) == (whole, None, 512, 2)


def link(name, to="/etc/passwd"):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = tarfile.SYMTYPE, to
    return made


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("../x_dev.csv", b"")], "not plain data"),
        ([("/etc/dev/x_dev.csv", b"")], "not plain data"),
        ([(link("dev/x_dev.csv"), b"")], "not plain data"),
        ([("dev/x_dev.py", b"")], "not MMLU"),
        ([("test/x_test.csv", b"q,1,2,3,4")], "6 columns"),
        ([("test/x_test.csv", b"q,1,2,3,4,E")], "none of ABCD"),
        ([("test/x_test.csv", b'"q,1,2,3,4,A')], "damaged"),
        ([("test/x_test.csv", b"\xff,1,2,3,4,A")], "UTF-8"),
        ([("dev/x_dev.csv", b"q,1,2,3,4,A")], "no items"),
    ],
)
def test_an_archive_that_is_not_the_data_is_refused(tmp_path, members, said):
    archive(tmp_path / "mmlu_dev_val_test.tar.xz", members)
    with pytest.raises(InputError, match=said):
        eval_tasks.load("mmlu", tmp_path)


def test_what_is_too_large_or_cut_short_is_refused(data, tmp_path):
    bomb = tmp_path / "bomb.xz"
    bomb.write_bytes(lzma.compress(bytes(1 << 20)))
    with pytest.raises(InputError, match="more than 1000 bytes"):
        readers.read(bomb, 1000)
    whole = (data / "mmlu_dev_val_test.tar.xz").read_bytes()
    (tmp_path / "mmlu_dev_val_test.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="copy it again"):
        eval_tasks.load("mmlu", tmp_path)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": 1}\n'))
    with pytest.raises(InputError, match="fields"):
        eval_tasks.load("humaneval", tmp_path)
    (tmp_path / "mbpp.jsonl").write_bytes(b"{")
    with pytest.raises(InputError, match="line 1 is not valid JSON"):
        eval_tasks.load("mbpp", tmp_path)


SPEC = {"question_id": 1, "category": "c", "turns": ["Say"]}
EXAM = GAOKAO["2010-2022_Biology_MCQs"][0]
FILES = {
    "gsm8k_test.jsonl": ("gsm8k", {"question": "1 + 1?", "answer": "#### 2"}),
    "HumanEval.jsonl": ("humaneval", HUMANEVAL),
    "mbpp.jsonl": ("mbpp", MBPP[1]),
    "spec_bench_question.jsonl": ("spec_bench", SPEC),
    "gaokao_bench_Data.tar": ("gaokao", EXAM),
}


@pytest.mark.parametrize(
    ("file", "field"), [(file, field) for file, (_, row) in FILES.items() for field in row]
)
def test_fields_of_another_kind_are_said(tmp_path, file, field):
    task, row = FILES[file]
    values = [None, 1.5, True, {"a": 1}, 7 if isinstance(row[field], str | list) else "7"]
    values += [[], [1], ["x", None]] if isinstance(row[field], list) else [["x"]]
    for value in values:
        content = json.dumps(
            {"example": [row | {field: value}]} if task == "gaokao" else row | {field: value}
        )
        if task == "gaokao":
            name = "Data/Objective_Questions/2010-2022_Biology_MCQs.json"
            archive(tmp_path / f"{file}.xz", [(name, content.encode())])
        else:
            (tmp_path / file).write_text(content)
        with pytest.raises(InputError, match=f": {field} is .*, not a.*: it is not the data set"):
            eval_tasks.load(task, tmp_path, shots=0)


def test_an_exam_without_a_list_of_examples_is_refused(tmp_path):
    for example in (None, {}, [], ["x"], [[]]):
        content = json.dumps({"example": example}).encode()
        archive(tmp_path / "gaokao_bench_Data.tar.xz", [("D/Objective_Questions/a.json", content)])
        with pytest.raises(InputError, match="example is .* not a list of objects"):
            eval_tasks.load("gaokao", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nope", {}, "known: mmlu"),
        ("mmlu", {"limit": 0}, "at least one"),
        ("mmlu", {"shots": 6}, "0 to 5"),
        ("gsm8k", {"shots": 10}, "0 to 9"),
        ("wikitext", {"shots": 1}, "0 to 0"),
    ],
)
def test_what_a_task_cannot_do_is_said(data, name, options, said):
    with pytest.raises(InputError, match=said):
        eval_tasks.load(name, data, **options)


def test_missing_data_is_said(tmp_path):
    with pytest.raises(InputError, match="mbpp.jsonl"):
        eval_tasks.load("mbpp", tmp_path)
    with pytest.raises(InputError, match="--data"):
        eval_tasks.load("mbpp", tmp_path / "nowhere")


@pytest.mark.skipif(not held_out.DATA.is_dir(), reason=f"no data sets at {held_out.DATA}")
def test_the_published_data_sets_are_whole():
    sizes = {"mmlu": 14042, "gsm8k": 1319, "humaneval": 164, "mbpp": 500, "wikitext": 62}
    sizes |= {"spec_bench": 480, "gaokao": 2944}
    found = {name: len(eval_tasks.load(name, held_out.DATA).items) for name in sizes}
    assert found == sizes
    embedded = pathlib.Path(__file__).parents[1] / "checkpoints" / "tiny"
    runtime = types.SimpleNamespace(tokenizer=Tokenizer.load(embedded))
    task = eval_tasks.load("wikitext_windows", held_out.DATA)
    cut = eval_compare.windowed(types.SimpleNamespace(runtime=runtime), task)
    assert len(cut.items) == 868 and cut.note.endswith("392 tokens left at the end")


def lm_eval_config(name):
    """A task's file in lm-eval, functions as their names."""
    yaml = pytest.importorskip("yaml")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    path = pathlib.Path(lm_eval.__file__).parent / "tasks" / name
    return yaml.load(path.read_text(), Loader)  # noqa: S506 - a SafeLoader


def test_prompts_equal_those_of_lm_evals_own_files(data):
    from jinja2 import Template

    def render(template, row):
        return Template(template, keep_trailing_newline=True).render(**row)

    about = lm_eval_config("mmlu/default/_default_template_yaml")
    row = {"question": QUESTION + " ", "choices": ["3", "4", "5, five", "6"]}
    item = eval_tasks.load("mmlu", data).items[1]
    head = lm_eval_config("mmlu/default/mmlu_astronomy.yaml")["description"]
    head = head.replace("astronomy", "world history")
    assert item.prompt == head + render(about["doc_to_text"], row)
    about = lm_eval_config("gsm8k/gsm8k.yaml")
    item = eval_tasks.load("gsm8k", data, shots=0).items[1]
    assert item.prompt == render(about["doc_to_text"], {"question": "test 1?"})
    assert list(item.until) == about["generation_kwargs"]["until"]
    assert about["num_fewshot"] == 5 and about["fewshot_split"] == "train"
    patterns = [f["filter"][0]["regex_pattern"] for f in about["filter_list"]]
    assert patterns == [texts.STRICT.pattern, texts.FLEXIBLE.pattern]
    assert about["metric_list"][0]["regexes_to_ignore"] == [*texts.IGNORED]
    about = lm_eval_config("humaneval/humaneval.yaml")
    [item] = eval_tasks.load("humaneval", data).items
    assert item.prompt == render(about["doc_to_text"], HUMANEVAL)
    assert item.program("").endswith("\n" + render(about["doc_to_target"], HUMANEVAL))
    settings = about["generation_kwargs"]
    assert (list(item.until), item.max_new_tokens) == (settings["until"], settings["max_gen_toks"])
    about = lm_eval_config("mbpp/mbpp.yaml")
    item = eval_tasks.load("mbpp", data, shots=0).items[0]
    assert item.prompt == render(about["doc_to_text"], MBPP[5])
    assert item.program("") == "\n" + render(about["doc_to_target"], MBPP[5])
    assert about["num_fewshot"] == 3 and list(item.until) == about["generation_kwargs"]["until"]


def test_texts_are_cleaned_by_lm_evals_own_code():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    odd = " = X = \n a 's \" b \" [ c ] { d } = = = = e ' f ' 1 ° 2 N , g @,@ h @-@ i ! \n"
    for page in (*PAGES, odd):
        assert texts.detokenized(page) == wikitext_detokenizer({"page": page})


def test_worked_examples_are_those_that_lm_eval_shows(data):
    config = lm_eval_config("gsm8k/gsm8k.yaml")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def dataset(**_):
        rows = {
            split: readers.json_lines(readers.find(data, f"gsm8k_{split}.jsonl"))
            for split in ("train", "test")
        }
        return {split: Dataset.from_list(own) for split, own in rows.items()}

    task = ConfigurableTask(config=config | {"custom_dataset": dataset})
    task.set_fewshot_seed(1234)  # simple_evaluate's default
    task.build_all_requests(limit=None, rank=0, world_size=1)
    theirs = [instance.args for instance in task.instances]
    items = eval_tasks.load("gsm8k", data).items
    assert [prompt for prompt, _ in theirs] == [item.prompt for item in items]
    assert theirs[0][1]["until"] == list(items[0].until)


@pytest.mark.skipif(not held_out.DATA.is_dir(), reason=f"no data sets at {held_out.DATA}")
@pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
def test_published_solutions_pass_their_tests_and_others_fail():
    for name in ("humaneval", "mbpp"):
        for item in eval_tasks.load(name, held_out.DATA, limit=4).items:
            right = item.gold.removesuffix("[DONE]")
            assert sandbox.run(item.program(right)).passed, item.id
            assert not sandbox.run(item.program("    return None\n")).passed, item.id
