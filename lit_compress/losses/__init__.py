"""Losses beside a module's own: what a student learns from a teacher, and how an autoencoder is fitted where somebody is."""

from lit_compress.losses.attention import attention_transfer
from lit_compress.losses.balancing import Balance, balance
from lit_compress.losses.confidence import hint, teacher_confidence
from lit_compress.losses.knowledge import knowledge_distillation, score_divergence
from lit_compress.losses.reconstruction import roi_reconstruction
from lit_compress.losses.terms import (
    AttentionTransfer,
    CrossEntropy,
    Hint,
    KnowledgeDistillation,
    ScoreDivergence,
    TeacherConfidence,
    Term,
)

__all__ = [
    "AttentionTransfer",
    "Balance",
    "CrossEntropy",
    "Hint",
    "KnowledgeDistillation",
    "ScoreDivergence",
    "TeacherConfidence",
    "Term",
    "attention_transfer",
    "balance",
    "hint",
    "knowledge_distillation",
    "roi_reconstruction",
    "score_divergence",
    "teacher_confidence",
]
