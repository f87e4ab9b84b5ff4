"""What SGLang imports in each of its processes with SGLANG_EXTERNAL_MODEL_PACKAGE=sglang_eplb: it holds no model."""
