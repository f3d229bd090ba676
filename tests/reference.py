"""The paper's equations written out with loops over Python floats, as slow and plain as possible.

Nothing here imports ``unike``: weights are explicit matrices, tensors are read as nested lists. The
last part makes the tiny random language models that several tests share.
"""

import math

import torch


def rows(tensor):
    return tensor.detach().double().tolist()


def dot(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def cosine(a, b):
    size = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / size if size else 0.0


def softmax(logits):
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [p / sum(powers) for p in powers]


def mixture(weights, vectors):
    return [sum(w * v[j] for w, v in zip(weights, vectors, strict=True)) for j in range(len(vectors[0]))]


def linear(vector, layer):
    """``W x + b`` of an ``nn.Linear``, one output at a time."""
    bias = rows(layer.bias) if layer.bias is not None else [0.0] * layer.out_features
    return [dot(line, vector) + b for line, b in zip(rows(layer.weight), bias, strict=True)]


def relu(z):
    return max(z, 0.0)


def silu(z):
    return z / (1 + math.exp(-z))


def gelu(z):
    return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))


# ---------------------------------------------------------------- feed-forward networks: 1, 3, 6


def memory_network(x, key_columns, key_biases, value_rows, act, up_columns=None, value_bias=None):
    """``sum_i act(x . k_i + b_i) v_i`` over explicit keys and values (Eq. 1); ``(T, d)``."""
    out = []
    for token in rows(x):
        total = list(value_bias) if value_bias is not None else [0.0] * len(value_rows[0])
        for i, (key, bias) in enumerate(zip(key_columns, key_biases, strict=True)):
            fired = act(dot(token, key) + bias)
            if up_columns is not None:
                fired *= dot(token, up_columns[i])
            for j, value in enumerate(value_rows[i]):
                total[j] += fired * value
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)


def edited_values(values, beta, zeta, projection):
    """``W_V + beta W_zeta zeta`` with the sum added to every row (Eq. 6)."""
    width = values.shape[1]
    shift = [0.0] * width
    for j in range(width):
        for i, z in enumerate(rows(zeta)):
            shift[j] += z * projection[i, j].item()
    return [[v + beta * shift[j] for j, v in enumerate(value)] for value in rows(values)]


# ---------------------------------------------------------------- attention: 2, 7


def attention(x, states, q, k, v, o, head_dim, logit_bias=None, visible=None):
    """``Attn(x; H, H)`` per head and token (Eq. 2): ``x (T, d)``, ``states (K, d)``.

    ``visible(t)`` gives the state indices that token ``t`` sees (all by default).
    """
    heads = q.out_features // head_dim
    group = heads // (k.out_features // head_dim)
    queries = [linear(row, q) for row in rows(x)]
    keys = [linear(row, k) for row in rows(states)]
    values = [linear(row, v) for row in rows(states)]
    out = []
    for t, query in enumerate(queries):
        seen = list(range(len(keys))) if visible is None else visible(t)
        joined = []
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            shared = slice(head // group * head_dim, (head // group + 1) * head_dim)
            logits = [dot(query[own], keys[i][shared]) / math.sqrt(head_dim) for i in seen]
            if logit_bias is not None:
                logits = [z + b for z, b in zip(logits, logit_bias, strict=True)]
            joined += mixture(softmax(logits), [values[i][shared] for i in seen])
        out.append(linear(joined, o))
    return torch.tensor(out, dtype=torch.float64)


def plain(x, states, logit_bias=None):
    """``softmax(x H^T) H``: ``x (T, d)``, ``states (K, d)``."""
    out = []
    for token in rows(x):
        logits = [dot(token, state) for state in rows(states)]
        if logit_bias is not None:
            logits = [z + b for z, b in zip(logits, logit_bias, strict=True)]
        out.append(mixture(softmax(logits), rows(states)))
    return torch.tensor(out, dtype=torch.float64)


def shifted(output, knowledge, alpha):
    """``(1 - alpha) h_input + alpha h_know`` for one prompt (Eq. 7): ``(T, d)``."""
    pairs = zip(rows(output), rows(knowledge), strict=True)
    return torch.tensor(
        [[(1 - alpha) * a + alpha * b for a, b in zip(one, two, strict=True)] for one, two in pairs],
        dtype=torch.float64,
    )


def adaptive_alpha(query, encoded_mixture):
    """Cosine of the encoded mixture with the state at ``p``, clamped to [0, 1] (Eq. 7)."""
    return min(1.0, max(0.0, cosine(rows(query), rows(encoded_mixture))))


# ---------------------------------------------------------------- contrastive losses: 4, 5


def truthfulness(pos, neg, tau, include_anchor):
    """Eq. 4, every anchor and every partner one by one."""
    labelled = [(row, True) for row in rows(pos)] + [(row, False) for row in rows(neg)]
    total = 0.0
    for i, (anchor, truth) in enumerate(labelled):
        same = different = 0.0
        for j, (other, other_truth) in enumerate(labelled):
            if i == j and not include_anchor:
                continue
            weight = math.exp(cosine(anchor, other) / tau)
            if truth == other_truth:
                same += weight
            else:
                different += weight
        total -= math.log(same / (same + different))
    return total / len(labelled)


def semantics(sem, pos, neg, tau):
    """Eq. 5, every sample against every sample's right and wrong answer."""
    total = 0.0
    for i, anchor in enumerate(rows(sem)):
        own = others = 0.0
        for j, (right, wrong) in enumerate(zip(rows(pos), rows(neg), strict=True)):
            weight = math.exp(cosine(anchor, right) / tau) + math.exp(cosine(anchor, wrong) / tau)
            if i == j:
                own += weight
            else:
                others += weight
        total -= math.log(own / (own + others))
    return total / len(sem)


def zeta(pos, neg):
    """``mean(pos) - mean(neg)`` of encoded states."""
    right, wrong = rows(pos), rows(neg)
    return torch.tensor(
        [
            sum(r[j] for r in right) / len(right) - sum(w[j] for w in wrong) / len(wrong)
            for j in range(len(right[0]))
        ],
        dtype=torch.float64,
    )


def top_k(query, keys, k):
    """``[(cosine, index)]`` of the ``k`` best keys, by repeatedly taking the best one left."""
    left = [(cosine(rows(query), key), i) for i, key in enumerate(rows(keys))]
    found = []
    while left and len(found) < k:
        best = left[0]
        for item in left[1:]:
            if item[0] > best[0]:
                best = item
        found.append(best)
        left.remove(best)
    return found


# ---------------------------------------------------------------- tiny random language models

TINY = {
    "opt": {"ffn_dim": 20, "word_embed_proj_dim": 16},
    "opt projected out": {"ffn_dim": 20, "word_embed_proj_dim": 12},
    "opt post-norm": {"ffn_dim": 20, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
    "llama": {"intermediate_size": 20},
    "mistral": {"intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 6},
    "qwen2": {"intermediate_size": 20, "num_key_value_heads": 2},
}


def tiny_model(kind, seed=0):
    """A two-layer float64 model, every parameter (biases and norms too) far from its initial value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind.split()[0],
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        attn_implementation="eager",
        **TINY[kind],
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(noise * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model
