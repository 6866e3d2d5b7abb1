"""Write the cards of the public LoraHub modules: `python adapters-index/pointers.py`.

`lorahub.txt` lists the modules as `constant.py` of github.com/sail-sg/lorahub does. What a card says of rank, scaling
and modules is what that repository's `train_model.py` and `run.sh` say they were trained with; data set and template
are read off the name; the category is ours. Nothing is downloaded, so a card promises no digest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

INDEX = Path(__file__).parent
OWNER, STEM = "lorahub", "flan_t5_large-"

# data sets by category; where one name begins another, the longer one counts
CATEGORIES = {
    "closed-book question answering": "kilt_tasks_hotpotqa web_questions wiki_qa",
    "commonsense reasoning": "definite_pronoun_resolution qasc quarel quartz social_i_qa super_glue_wsc.fixed wiqa",
    "natural language inference": (
        "anli_r1 anli_r2 anli_r3 glue_mnli glue_qnli glue_wnli snli super_glue_cb super_glue_rte"
    ),
    "paraphrase": "glue_mrpc glue_qqp glue_stsb paws_wiki",
    "question classification": "trec",
    "reading comprehension": (
        "adversarial_qa_dbert adversarial_qa_dbidaf adversarial_qa_droberta bool_q coqa dream drop duorc_ParaphraseRC "
        "duorc_SelfRC quac quail quoref race_high race_middle ropes sciq squad_v1.1 squad_v2.0 super_glue_multirc "
        "wiki_hop_original"
    ),
    "sentiment": "amazon_polarity app_reviews glue_sst2 imdb_reviews sentiment140 yelp_polarity_reviews",
    "structure to text": "gem_dart gem_e2e_nlg gem_web_nlg_en wiki_bio",
    "summarization": "newsroom",
    "topic": "ag_news_subset dbpedia_14",
    "translation": "para_crawl_enes wmt14_translate_fr-en wmt16_translate_ro-en wmt16_translate_tr-en",
    "words and text": (
        "fix_punct glue_cola lambada math_dataset_algebra__linear_1d super_glue_wic true_case word_segment"
    ),
}
CATEGORY_OF = {dataset: category for category, names in CATEGORIES.items() for dataset in names.split()}


def card(name: str) -> dict[str, Any]:
    """The card of the module `lorahub/flan_t5_large-<data set>[_<template>]`."""
    task = name.removeprefix(f"{OWNER}/{STEM}")
    dataset = max((d for d in CATEGORY_OF if task == d or task.startswith(d + "_")), key=len)
    template = task[len(dataset) :].replace("_", " ").strip() or None
    return {
        "version": 1,
        "name": name,
        "source": f"hf://{name}",
        "base": "google/flan-t5-large",
        "rank": 16,
        "alpha": 32,
        "targets": ["q", "v"],
        "task": f"{dataset}: {template}" if template else dataset,
        "category": CATEGORY_OF[dataset],
        "dataset": dataset,
        "template": template,
        "stated_by": "https://github.com/sail-sg/lorahub",
    }


def cards() -> dict[str, dict[str, Any]]:
    """All cards by name."""
    return {name: card(name) for name in (INDEX / "lorahub.txt").read_text().split()}


def main() -> None:
    shutil.rmtree(INDEX / "pointers" / OWNER, ignore_errors=True)
    for name, content in cards().items():
        path = INDEX / "pointers" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
