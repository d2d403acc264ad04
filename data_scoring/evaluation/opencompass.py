"""OpenCompass' definitions for base models, as lm-eval task configurations.

Without a chat template, OpenCompass joins the prompt and the answer with a line feed (`opencompass/models/base.py`),
hence the delimiters. The configurations are those of February 2024, when the paper was written; they have not changed.
"""

from typing import Any

from data_scoring.evaluation.rows import MARKUP, SENTIMENTS

# configs/datasets/SuperGLUE_AX_b/SuperGLUE_AX_b_ppl_6db806.py
AXB: dict[str, Any] = {
    "dataset_path": "aps/super_glue",
    "dataset_name": "axb",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{sentence1}}\n{{sentence2}}\nIs the sentence below entailed by the sentence above?",
    "doc_to_choice": ["Yes", "No"],
    "doc_to_target": "label",
    "target_delimiter": "\n",
}

# configs/datasets/FewCLUE_eprstmt/FewCLUE_eprstmt_ppl_d3c387.py
EPRSTMT: dict[str, Any] = {
    # Not on the hub; read from the benchmark's repository at a fixed commit.
    "dataset_path": "json",
    "dataset_kwargs": {
        "data_files": {
            "test": "https://raw.githubusercontent.com/CLUEbenchmark/FewCLUE/"
            "62a02c6f31cf32814cfe522f78ef088228840f8d/datasets/eprstmt/test_public.json"
        }
    },
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": '内容： "{{sentence}}"。情绪分类：',
    "doc_to_choice": ["消极。", "积极。"],
    "doc_to_target": lambda doc: SENTIMENTS.index(doc["label"]),
    "target_delimiter": "\n",
}

# configs/datasets/Xsum/Xsum_gen_31397e.py; 100 tokens as its models' configurations have it.
XSUM: dict[str, Any] = {
    "dataset_path": "EdinburghNLP/xsum",
    "validation_split": "validation",
    "output_type": "generate_until",
    "doc_to_text": "Document：{{document}}\nBased on the previous text, provide a brief single summary:",
    "doc_to_target": "{{summary}}",
    # No stop string: what comes before the summary may be a line feed, which is stripped afterwards.
    "generation_kwargs": {"max_gen_toks": 100, "do_sample": False, "until": []},
}

# configs/datasets/CLUE_C3/CLUE_C3_ppl_e24a31.py and opencompass/datasets/c3.py. OpenCompass fills up to four options
# with copies of the first; ties go to the first option, so a copy is never chosen.
C3: dict[str, Any] = {
    "dataset_path": "clue/clue",
    "dataset_name": "c3",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "文章：{{context | join(' ')}}\n问题：{{question}}",
    "doc_to_choice": lambda doc: [f"答案：{choice}" for choice in doc["choice"]],
    "doc_to_target": lambda doc: doc["choice"].index(doc["answer"]),
    "target_delimiter": "\n",
}

# configs/datasets/ARC_e/ARC_e_ppl_a450bd.py and opencompass/datasets/arc.py, which skips items without four options.
ARC_EASY: dict[str, Any] = {
    "dataset_path": "allenai/ai2_arc",
    "dataset_name": "ARC-Easy",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer: ",
    "doc_to_choice": lambda doc: doc["choices"]["text"],
    "doc_to_target": lambda doc: doc["choices"]["label"].index(doc["answerKey"]),
    "target_delimiter": "\n",
}


def hellaswag_context(doc: dict[str, Any]) -> str:
    """Return the context of a HellaSwag item, as `opencompass/datasets/hellaswag.py` reads it.

    That file cuts lm-eval's query after the second ": ", so a context that holds one loses what precedes it.
    """
    query = hellaswag_text(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
    return query.split(": ", 2)[-1]


def hellaswag_text(text: str) -> str:
    """Return a text of HellaSwag without WikiHow's headings, as lm-eval's `hellaswag/utils.py` cleans it.

    OpenCompass' copy of the data set has the fields that lm-eval makes.
    """
    return MARKUP.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# configs/datasets/hellaswag/hellaswag_ppl_47bff9.py
HELLASWAG: dict[str, Any] = {
    "dataset_path": "Rowan/hellaswag",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": hellaswag_context,
    "doc_to_choice": lambda doc: [hellaswag_text(ending) for ending in doc["endings"]],
    "doc_to_target": lambda doc: int(doc["label"]),
    "target_delimiter": "\n",
}
