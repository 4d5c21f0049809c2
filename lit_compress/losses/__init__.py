"""Losses that let a student learn from a teacher: functions of tensors, and terms that know which layers they read."""

from lit_compress.losses.attention import attention_transfer
from lit_compress.losses.confidence import hint, teacher_confidence
from lit_compress.losses.knowledge import knowledge_distillation
from lit_compress.losses.terms import AttentionTransfer, CrossEntropy, Hint, KnowledgeDistillation, TeacherConfidence, Term

__all__ = [
    "AttentionTransfer",
    "CrossEntropy",
    "Hint",
    "KnowledgeDistillation",
    "TeacherConfidence",
    "Term",
    "attention_transfer",
    "hint",
    "knowledge_distillation",
    "teacher_confidence",
]
