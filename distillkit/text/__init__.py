"""Text: vocabularies, corpora, ELECTRA pretraining, tasks in GLUE's formats, the search of LV-BERT.

Needs transformers, with which tokenizers comes: pip install "distillkit[transformers]".
"""
