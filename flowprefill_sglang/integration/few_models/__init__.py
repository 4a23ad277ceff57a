"""What ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names: SGLang imports each module here and takes its ``EntryClass``."""
