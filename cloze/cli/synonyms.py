"""What users of other tools type, and the key of ours that means it: a wrong name is told by meaning before spelling.

The words are those of Hugging Face's Trainer and run_mlm.py, Megatron-LM, MosaicML's Composer and llm-foundry, and
fairseq, whatever their dashes, underscores and capitals. Of the keys beside a word the first that a command has counts.
Knows no schema: `explanation` holds the keys against the one at hand.
"""

from collections.abc import Collection
from typing import NamedTuple


class Meaning(NamedTuple):
    """A key of ours that says what another tool's word says."""

    key: str
    value: str = "{}"  # to paste after `=`; {} is what was typed, … what only the user knows; "": the note alone helps
    note: str = ""  # where the two are not the same thing


_BATCH_NOTE = "accumulation follows from global_batch_size and micro_batch_size"
_EPOCHS = Meaning("steps", "…", "a pass has samples / global_batch_size steps; python -m pretrain.plan tells")
_SAVED_AT = Meaning("run", "…", "the same name resumes the run; runs_root is the directory of all runs")
_LENGTH = Meaning("data.path", "", "the length is the corpus': prepare it with python -m data_prep max_len={}")
_MASKS = Meaning("data.path", "", "masks are drawn with the corpus: prepare it with python -m data_prep masking={}")
_DEVICES = Meaning("world_size", "", "the devices are found, and CUDA_VISIBLE_DEVICES tells which to take")
_WARMUP = Meaning("schedule.warmup_fraction", "…", "a share of the steps: 10,000 of 100,000 are 0.1")
_RANKS = Meaning("world_size", "", "processes are started by python -m launch procs={}, with the same overrides")
_LESS = "…"

# word: of all tools, lower case, underscores
SYNONYMS: dict[str, tuple[Meaning, ...]] = {
    # the rate and its schedule
    "lr": (Meaning("optim.lr"), Meaning("lr")),
    "learning_rate": (Meaning("optim.lr"), Meaning("lr")),
    "max_lr": (Meaning("optim.lr"), Meaning("lr")),
    "peak_lr": (Meaning("optim.lr"), Meaning("lr")),
    "optimizer": (Meaning("optim"),),
    "optimizer_name": (Meaning("optim"),),
    "scheduler": (Meaning("schedule"),),
    "lr_scheduler": (Meaning("schedule"),),
    "lr_scheduler_type": (Meaning("schedule"),),
    "lr_decay_style": (Meaning("schedule"),),
    "min_lr": (Meaning("schedule.final_fraction", _LESS, "a share of the peak"),),
    "alpha_f": (Meaning("schedule.final_fraction"),),
    "warmup": (_WARMUP, Meaning("optim.warmup_fraction", _LESS)),
    "warmup_steps": (_WARMUP, Meaning("optim.warmup_fraction", _LESS, "a share of the steps")),
    "warmup_updates": (_WARMUP,),
    "num_warmup_steps": (_WARMUP, Meaning("optim.warmup_fraction", _LESS, "a share of the steps")),
    "t_warmup": (_WARMUP,),
    "lr_warmup_iters": (_WARMUP,),
    "lr_warmup_fraction": (Meaning("schedule.warmup_fraction"),),
    "warmup_ratio": (Meaning("schedule.warmup_fraction"), Meaning("optim.warmup_fraction")),
    "wd": (Meaning("optim.weight_decay"),),
    "weight_decay": (Meaning("optim.weight_decay"),),
    "adam_beta1": (Meaning("optim.beta1"),),
    "adam_beta2": (Meaning("optim.beta2"),),
    "adam_betas": (Meaning("optim.beta2", _LESS, "optim.beta1 is the first"),),
    "betas": (Meaning("optim.beta2", _LESS, "optim.beta1 is the first"),),
    "adam_eps": (Meaning("optim.eps"),),
    "adam_epsilon": (Meaning("optim.eps"),),
    "max_grad_norm": (Meaning("optim.clip"),),
    "grad_clip": (Meaning("optim.clip"),),
    "gradient_clip_val": (Meaning("optim.clip"),),
    "gradient_clipping": (Meaning("optim.clip"),),
    "clip_grad": (Meaning("optim.clip"),),
    "clip_norm": (Meaning("optim.clip"),),
    "layerwise_lr_decay": (Meaning("optim.layer_decay"),),
    # batches and length
    "batch_size": (Meaning("global_batch_size"), Meaning("batch_size"), Meaning("batch_tokens", _LESS)),
    "train_batch_size": (Meaning("global_batch_size"), Meaning("batch_size")),
    "global_train_batch_size": (Meaning("global_batch_size"),),
    "per_device_train_batch_size": (Meaning("micro_batch_size"), Meaning("batch_size")),
    "per_device_eval_batch_size": (Meaning("micro_batch_size"), Meaning("batch_size")),
    "per_gpu_train_batch_size": (Meaning("micro_batch_size"), Meaning("batch_size")),
    "device_train_batch_size": (Meaning("micro_batch_size"),),
    "device_train_microbatch_size": (Meaning("micro_batch_size"),),
    "train_micro_batch_size_per_gpu": (Meaning("micro_batch_size"),),
    "microbatch_size": (Meaning("micro_batch_size"),),
    "max_sentences": (Meaning("micro_batch_size"),),
    "gradient_accumulation_steps": (Meaning("global_batch_size", _LESS, _BATCH_NOTE), Meaning("batch_size", _LESS)),
    "grad_accum": (Meaning("global_batch_size", _LESS, _BATCH_NOTE), Meaning("batch_size", _LESS)),
    "accumulate_grad_batches": (Meaning("global_batch_size", _LESS, _BATCH_NOTE),),
    "update_freq": (Meaning("global_batch_size", _LESS, _BATCH_NOTE),),
    "max_steps": (Meaning("steps"), Meaning("epochs", _LESS)),
    "num_steps": (Meaning("steps"), Meaning("epochs", _LESS)),
    "total_steps": (Meaning("steps"),),
    "num_train_steps": (Meaning("steps"),),
    "train_iters": (Meaning("steps"),),
    "max_iters": (Meaning("steps"),),
    "iterations": (Meaning("steps"),),
    "max_update": (Meaning("steps"),),
    "total_num_update": (Meaning("steps"),),
    "max_duration": (_EPOCHS._replace(note="in optimizer steps: 100ba are 100"), Meaning("epochs", _LESS)),
    "epochs": (_EPOCHS, Meaning("epochs"), Meaning("passes")),
    "num_epochs": (_EPOCHS, Meaning("epochs"), Meaning("passes")),
    "max_epoch": (_EPOCHS, Meaning("epochs")),
    "max_epochs": (_EPOCHS, Meaning("epochs")),
    "num_train_epochs": (_EPOCHS, Meaning("epochs")),
    "dupe_factor": (Meaning("passes"),),
    "max_time": (Meaning("budget.hours", _LESS, "in hours"),),
    "exit_duration_in_mins": (Meaning("budget.hours", _LESS, "in hours"),),
    "max_seq_length": (Meaning("max_len"), _LENGTH),
    "max_seq_len": (Meaning("max_len"), _LENGTH),
    "max_length": (Meaning("max_len"), _LENGTH),
    "seq_len": (Meaning("max_len"), _LENGTH),
    "seq_length": (Meaning("max_len"), _LENGTH),
    "sequence_length": (Meaning("max_len"), _LENGTH),
    "block_size": (Meaning("max_len"), _LENGTH),
    "tokens_per_sample": (Meaning("max_len"), _LENGTH),
    "max_len": (Meaning("max_len"), _LENGTH),
    "doc_stride": (Meaning("stride"),),
    # the model, and where it starts
    "model_name_or_path": (Meaning("init_from"), Meaning("model")),
    "model_name": (Meaning("init_from"), Meaning("model")),
    "model_path": (Meaning("init_from"), Meaning("model")),
    "pretrained_model": (Meaning("init_from"), Meaning("model")),
    "pretrained_model_name": (Meaning("init_from"), Meaning("model")),
    "init_checkpoint": (Meaning("init_from"), Meaning("model")),
    "checkpoint_path": (Meaning("init_from"), Meaning("model")),
    "load_path": (Meaning("init_from"), Meaning("model")),
    "load": (Meaning("init_from"),),
    "restore_file": (Meaning("init_from"),),
    "finetune_from_model": (Meaning("init_from"),),
    "resume_from_checkpoint": (_SAVED_AT,),
    "autoresume": (_SAVED_AT,),
    "arch": (Meaning("model"),),
    "model_type": (Meaning("model.architecture"), Meaning("model")),
    "config_name": (Meaning("model"),),
    "num_hidden_layers": (Meaning("model.num_layers"),),
    "num_layers": (Meaning("model.num_layers"),),
    "n_layers": (Meaning("model.num_layers"),),
    "encoder_layers": (Meaning("model.num_layers"),),
    "hidden_size": (Meaning("model.hidden_size"),),
    "d_model": (Meaning("model.hidden_size"),),
    "encoder_embed_dim": (Meaning("model.hidden_size"),),
    "num_attention_heads": (Meaning("model.num_heads"),),
    "n_heads": (Meaning("model.num_heads"),),
    "encoder_attention_heads": (Meaning("model.num_heads"),),
    "ffn_hidden_size": (Meaning("model.intermediate_size"),),
    "encoder_ffn_embed_dim": (Meaning("model.intermediate_size"),),
    "max_position_embeddings": (Meaning("model.max_positions"),),
    "max_positions": (Meaning("model.max_positions"),),
    "hidden_dropout": (Meaning("model.dropout"), Meaning("dropout")),
    "hidden_dropout_prob": (Meaning("model.dropout"), Meaning("dropout")),
    "attention_probs_dropout_prob": (Meaning("model.attention_dropout"), Meaning("dropout")),
    "attention_dropout": (Meaning("model.attention_dropout"), Meaning("dropout")),
    "attn_implementation": (Meaning("model.attention"),),
    "init_method_std": (Meaning("model.init_std"),),
    "initializer_range": (Meaning("model.init_std"),),
    "gradient_checkpointing": (Meaning("model.activation_checkpointing"),),
    "recompute_activations": (Meaning("model.activation_checkpointing"),),
    "lora_r": (Meaning("lora.rank"),),
    "lora.r": (Meaning("lora.rank"),),
    "r": (Meaning("lora.rank"),),
    "lora_rank": (Meaning("lora.rank"),),
    "lora_alpha": (Meaning("lora.alpha"),),
    # data and masking
    "data_path": (Meaning("data.path"), Meaning("data.train"), Meaning("data"), Meaning("source.paths", "[{}]")),
    "data_dir": (Meaning("data.path"), Meaning("data"), Meaning("source.paths", "[{}]")),
    "dataset": (Meaning("data.path"), Meaning("data.train"), Meaning("data"), Meaning("source")),
    "dataset_name": (Meaning("data.path"), Meaning("data.train"), Meaning("data"), Meaning("source", "hub")),
    "train_file": (Meaning("data.path"), Meaning("data.train"), Meaning("source.paths", "[{}]")),
    "train_data": (Meaning("data.path"), Meaning("data.train"), Meaning("source.paths", "[{}]")),
    "validation_file": (Meaning("data.dev"), Meaning("val_sources", "[{{kind:text,paths:[{}],name:dev}}]")),
    "validation_split_percentage": (
        Meaning("val_fraction", _LESS, "a share: 5% are 0.05"),
        Meaning("data.dev_fraction", _LESS),
    ),
    "test_file": (Meaning("data.test"),),
    **dict.fromkeys(("validation", "valid", "val", "dev", "dev_file", "eval_file"), (Meaning("data.dev"),)),
    **dict.fromkeys(("seeds", "n_seeds"), (Meaning("num_seeds"),)),
    **dict.fromkeys(("freeze", "freeze_encoder"), (Meaning("freeze_layers", _LESS, "so many of the lowest layers"),)),
    "input": (Meaning("source.paths", "[{}]"), Meaning("in"), Meaning("data.path")),
    "input_file": (Meaning("source.paths", "[{}]"), Meaning("in"), Meaning("data.path")),
    "input_files": (Meaning("source.paths", "[{}]"), Meaning("in")),
    "files": (Meaning("source.paths", "[{}]"), Meaning("in")),
    "path": (Meaning("source.paths", "[{}]"), Meaning("data.path")),
    "paths": (Meaning("source.paths", "[{}]"), Meaning("data.path")),
    "text_column": (Meaning("source.field"), Meaning("columns", "[{}]"), Meaning("data.columns", "[{}]")),
    "text_column_name": (Meaning("source.field"), Meaning("columns", "[{}]"), Meaning("data.columns", "[{}]")),
    "json_keys": (Meaning("source.field"),),
    "line_by_line": (Meaning("source.document", "line"),),
    "vocab_file": (Meaning("tokenizer.path"),),
    "tokenizer_name": (Meaning("tokenizer.path"),),
    "tokenizer_name_or_path": (Meaning("tokenizer.path"),),
    "vocab_size": (Meaning("tokenizer.vocab_size"),),
    "tokenizer_type": (Meaning("tokenizer.kind"),),
    "dedup": (Meaning("clean.near_duplicates", _LESS, "a likeness: 0.8"),),
    "do_lower_case": (Meaning("tokenizer.lowercase"),),
    "lowercase": (Meaning("tokenizer.lowercase"),),
    "mlm_probability": (Meaning("data.masking_probability"), Meaning("masking.probability"), Meaning("masking")),
    "mask_prob": (Meaning("data.masking_probability"), Meaning("masking.probability"), Meaning("masking")),
    "masked_lm_prob": (Meaning("data.masking_probability"), Meaning("masking.probability"), Meaning("masking")),
    "masking_probability": (Meaning("data.masking_probability"), Meaning("masking.probability"), Meaning("masking")),
    "random_token_prob": (Meaning("data.random_share", _LESS, "a share of the tokens to predict"),),
    "leave_unmasked_prob": (Meaning("data.mask_share", _LESS, "1 less this and data.random_share"),),
    "max_predictions_per_seq": (Meaning("masking.max_predictions"),),
    "mask_whole_words": (Meaning("masking", "whole_word"),),
    "do_whole_word_mask": (Meaning("masking", "whole_word"),),
    "masking": (_MASKS,),
    "device": (_DEVICES,),
    "no_cuda": (_DEVICES,),
    "use_cpu": (_DEVICES,),
    "accelerator": (_DEVICES,),
    "nsp": (Meaning("objective", "nsp"), Meaning("loss.nsp_weight", _LESS)),
    "dataloader_num_workers": (Meaning("data.workers"), Meaning("executor.workers")),
    "num_workers": (Meaning("data.workers"), Meaning("executor.workers")),
    "preprocessing_num_workers": (Meaning("executor.workers"), Meaning("data.workers")),
    "num_proc": (Meaning("executor.workers"), Meaning("data.workers")),
    "workers": (Meaning("executor.workers"), Meaning("data.workers")),
    # what is written, and when
    "output_dir": (Meaning("out"), _SAVED_AT),
    "output": (Meaning("out"), _SAVED_AT),
    "out_dir": (Meaning("out"), _SAVED_AT),
    "output_path": (Meaning("out"), _SAVED_AT),
    "output_prefix": (Meaning("out"), _SAVED_AT),
    "out": (Meaning("out"), _SAVED_AT),
    "save": (_SAVED_AT,),
    "save_dir": (Meaning("out"), _SAVED_AT),
    "save_folder": (Meaning("checkpoint.upload"), Meaning("out")),
    "save_path": (Meaning("out"), _SAVED_AT),
    "run_name": (Meaning("run"),),
    "name": (Meaning("run"),),
    "experiment_name": (Meaning("run"),),
    "exp_name": (Meaning("run"),),
    "logging_steps": (Meaning("log.every"),),
    "log_interval": (Meaning("log.every"),),
    "eval_steps": (Meaning("eval.every"),),
    "eval_interval": (Meaning("eval.every"),),
    "validate_interval_updates": (Meaning("eval.every"),),
    "save_steps": (Meaning("checkpoint.every"),),
    "save_interval": (Meaning("checkpoint.every"),),
    "save_interval_updates": (Meaning("checkpoint.every"),),
    "save_total_limit": (Meaning("checkpoint.keep_last"),),
    "save_num_checkpoints_to_keep": (Meaning("checkpoint.keep_last"),),
    "keep_interval_updates": (Meaning("checkpoint.keep_last"),),
    "report_to": (Meaning("wandb.mode", "auto"),),
    "wandb_project": (Meaning("wandb.project"),),
    "wandb": (Meaning("wandb.mode", "auto"),),
    "project": (Meaning("wandb.project"),),
    "tensorboard_dir": (Meaning("log.tensorboard", "true"),),
    "tensorboard": (Meaning("log.tensorboard"),),
    "early_stopping_patience": (Meaning("patience"),),
    # numbers and machines
    "fp16": (Meaning("precision", "fp16"), Meaning("precision", "bf16")),
    "bf16": (Meaning("precision", "bf16"),),
    "bfloat16": (Meaning("precision", "bf16"),),
    "mixed_precision": (Meaning("precision"),),
    "dtype": (Meaning("precision"),),
    "torch_dtype": (Meaning("precision"),),
    "amp": (Meaning("precision", "bf16"),),
    "torch_compile": (Meaning("compile"),),
    "zero_stage": (Meaning("zero"),),
    "stage": (Meaning("zero"),),
    "zero_optimization": (Meaning("zero", _LESS),),
    "cpu_offload": (Meaning("zero", "2_offload"),),
    "random_seed": (Meaning("seed"),),
    "data_seed": (Meaning("seed"),),
    "gpus": (Meaning("gpus"), Meaning("procs"), _RANKS),
    "num_gpus": (Meaning("gpus"), Meaning("procs"), _RANKS),
    "nproc_per_node": (Meaning("gpus"), Meaning("procs"), _RANKS),
    "nproc": (Meaning("gpus"), Meaning("procs"), _RANKS),
    "hostfile": (Meaning("hosts"),),
    "nnodes": (Meaning("nodes"),),
    "num_nodes": (Meaning("nodes"),),
}

# section: the key of it that is meant where the section itself is given a value
SECTIONS = {
    "wandb": "wandb.mode",
    "lora": "lora.rank",
    "eval": "eval.every",
    "checkpoint": "checkpoint.every",
    "log": "log.every",
    "budget": "budget.hours",
    "data": "data.path",
    "tokenizer": "tokenizer.path",
    "distill": "distill.teacher",
    "adversary": "adversary.kind",
}

# option of a group, or value of a key, that another tool calls so: (group or key, word)
OPTIONS: dict[tuple[str, str], str] = {
    ("recipe", "bert"): "bert_2018",
    ("recipe", "original"): "bert_2018",
    ("recipe", "mosaicbert"): "mosaic",
    ("recipe", "crammed"): "cramming",
    ("recipe", "lamb"): "lamb_phase1",
    ("model", "bert"): "base",
    ("model", "bert_mini"): "mini",
    ("model", "modernbert"): "modernbert_base",
    ("optim", "adam"): "adamw",
    ("optim", "adamw_torch"): "adamw",
    ("optim", "adamw_torch_fused"): "adamw",
    ("optim", "fused_adam"): "adamw",
    ("optim", "decoupled_adamw"): "adamw",
    ("schedule", "linear_decay_with_warmup"): "linear",
    ("schedule", "linear_with_warmup"): "linear",
    ("schedule", "cosine_with_warmup"): "cosine",
    ("schedule", "constant_with_warmup"): "constant",
    ("schedule", "polynomial_decay"): "polynomial",
    ("schedule", "warmup_stable_decay"): "wsd",
    ("source", "txt"): "text",
    ("source", "json"): "jsonl",
    ("source", "wikipedia"): "wikidump",
    ("source", "wiki"): "wikidump",
    ("source", "huggingface"): "hub",
    ("source", "hf"): "hub",
    ("executor", "slurm"): "array",
    ("executor", "multiprocessing"): "local",
    **dict.fromkeys([("precision", word) for word in ("float16", "half", "16", "16_mixed")], "fp16"),
    **dict.fromkeys([("precision", word) for word in ("bfloat16", "bf16_mixed", "amp")], "bf16"),
    **dict.fromkeys([("precision", word) for word in ("float32", "float", "32", "full")], "fp32"),
    **dict.fromkeys([("wandb.mode", word) for word in ("off", "none", "no", "false")], "disabled"),
    **dict.fromkeys([("wandb.mode", word) for word in ("on", "yes", "true")], "online"),
    ("objective", "mlm"): "none",
    ("tokenizer.kind", "sentencepiece"): "unigram",
    ("tokenizer.kind", "bert"): "wordpiece",
    ("task", "sentiment"): "sst2",
    ("task", "text_classification"): "classification",
    ("task", "token_classification"): "ner",
    ("task", "pos"): "ner",
    ("task", "qa"): "squad",
    ("task", "question_answering"): "squad",
    ("task", "sts"): "stsb",
    ("masking", "wwm"): "whole_word",
    ("masking", "whole_words"): "whole_word",
    ("masking", "spanbert"): "span",
}


def plain(word: str) -> str:
    """`per_device_train_batch_size` of `--Per-Device-Train-Batch-Size`."""
    return word.strip().lstrip("-+~").replace("-", "_").replace("/", "_").lower()


def meaning_of(word: str, keys: Collection[str]) -> Meaning | None:
    """What a word of another tool is called here, by one of `keys`; None where that is not known.

    Of a dotted word, `optim.learning_rate`, the last part counts where the whole is not known.
    """
    whole = plain(word)
    for known in dict.fromkeys((whole, whole.replace(".", "_"), whole.rpartition(".")[2])):
        for meaning in SYNONYMS.get(known, ()):
            if meaning.key in keys and meaning.key != word:
                return meaning
    return None


def option_of(group: str, word: str, options: Collection[str]) -> str | None:
    """The option of a group that `word` means: by the table, or as a part of the other's name (`bert-base-uncased`)."""
    name = plain(word)
    if (known := OPTIONS.get((group, name))) in options:
        return known
    parts = [part for part in name.split("_") if part not in ("uncased", "cased")]
    for family in ("modernbert_", ""):
        for part in parts:
            if (found := f"{family}{part}") in options and (family == "" or "modernbert" in parts):
                return found
    return next((option for option in options if name in option.split("_")), None)
