"""What SGLang imports in each of its processes with SGLANG_EXTERNAL_MODEL_PACKAGE=sglang_sync: it holds no model."""
