"""Danube3 once more, in plain NumPy: the same functions as danube3.py, written from the formulas alone.

The tests hold the fast PyTorch code against this file, so it is slow, exact and short: float64 except where a format
asks for less (quantization), no classes, no state, nothing but numpy. Every backward function carries its derivation.
Read it as a second textbook:

    1. building blocks, forward and backward    5. the staged mixture
    2. the model, forward and backward          6. the training step
    3. sampling                                 7. LoRA
    4. optimizer and schedule                   8. quantization

Shapes: B batch, T sequence length (queries), S cached + new positions (keys), D hidden_size, I intermediate_size,
V vocab_size, H query heads, K key/value heads, h head_dim, G = H / K query heads to one key/value head, N = B * T,
".." any axes.
In a backward function `grad` is dL/d(output), and dx stands for dL/dx: it always has the shape of x.

Arrays are used in the precision they come in: pass float64 ones.
"""
import math

import numpy as np

IGNORE_INDEX = -100  # a label that carries no loss


# ---------------------------------------------------------------------------------------------------------------------
# 1. Building blocks. Each forward is one formula. Each backward is the chain rule, applied to that formula by hand.

def sigmoid(x):
    """sigma(x) = 1 / (1 + exp(-x)), through log sigma(x) = -log(e^0 + e^-x): no overflow at either end."""
    return np.exp(-np.logaddexp(0.0, -x))


def softmax(x):
    """p_i = exp(x_i) / sum_j exp(x_j) along the last axis; subtracting the largest x changes nothing but the range."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def linear(x, weight):  # x [.., in], weight [out, in] -> [.., out]
    """y_o = sum_i weight_oi x_i. No bias anywhere in this model."""
    return x @ weight.T


def linear_backward(grad, x, weight):  # grad [.., out], x [.., in], weight [out, in] -> dx [.., in], dweight [out, in]
    """dx_i = sum_o grad_o dy_o/dx_i = sum_o grad_o weight_oi, and dweight_oi = sum over all N of grad_o x_i."""
    grad_rows = grad.reshape(-1, weight.shape[0])  # [N, out]
    x_rows = x.reshape(-1, weight.shape[1])        # [N, in]
    return grad @ weight, grad_rows.T @ x_rows


def embedding(input_ids, weight):  # input_ids [..], weight [V, D] -> [.., D]
    """Row input_ids of the table: a linear layer whose input is one-hot, without the multiplications by zero."""
    return weight[input_ids]


def embedding_backward(grad, input_ids, vocab_size):  # grad [.., D], input_ids [..] -> dweight [V, D]
    """Row v was copied to every place where the id is v, so its gradient is the sum over those places."""
    dweight = np.zeros((vocab_size, grad.shape[-1]))
    np.add.at(dweight, input_ids, grad)  # unlike dweight[input_ids] += grad, this counts repeated ids every time
    return dweight


def rms_norm(x, weight, eps):  # x [.., D], weight [D] -> [.., D]
    """y = weight * x * r  with  r = 1 / sqrt(mean(x^2) + eps)."""
    r = 1.0 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)  # [.., 1]
    return weight * x * r


def rms_norm_backward(grad, x, weight, eps):  # grad [.., D], x [.., D], weight [D] -> dx [.., D], dweight [D]
    """y_i = w_i x_i r, where r itself depends on every x_j:

        dr/dx_j   = d/dx_j (mean(x^2) + eps)^(-1/2) = -1/2 r^3 * 2 x_j / D = -r^3 x_j / D
        dy_i/dx_j = w_i r [i = j]  -  w_i x_i r^3 x_j / D
        dx_j      = sum_i g_i dy_i/dx_j = r ( g_j w_j  -  (x_j r) * 1/D sum_i g_i w_i (x_i r) )
        dw_i      = sum over all N of g_i x_i r

    The bracket takes out of g * w its component along x: scaling x leaves y as it is (but for eps)."""
    r = 1.0 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)        # [.., 1]
    x_hat = x * r                                                         # [.., D]
    dx_hat = grad * weight                                                # [.., D]
    dx = r * (dx_hat - x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True))
    dweight = (grad * x_hat).reshape(-1, x.shape[-1]).sum(axis=0)         # [.., D] -> [N, D] -> [D]
    return dx, dweight


def rotary_table(positions, head_dim, theta):  # positions [T] -> cos [T, h/2], sin [T, h/2]
    """Angle of pair i at position p: p * theta^(-2i/h). Pair 0 rotates fastest (a radian a token), the last slowest."""
    frequencies = theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)        # [h/2]
    angles = np.asarray(positions, np.float64)[:, None] * frequencies          # [T, h/2]
    return np.cos(angles), np.sin(angles)


def rotary_embedding(x, cos, sin):  # x [.., T, h], cos [T, h/2], sin [T, h/2] -> [.., T, h]
    """Rotate each pair (a_i, b_i) = (x_i, x_{i+h/2}) by its angle ("rotate half": the partner lies half a head away):

        a' = a cos - b sin,    b' = b cos + a sin

    Both q and k are rotated, so q(m) . k(n) depends on the distance m - n only."""
    a, b = np.split(x, 2, axis=-1)  # [.., T, h/2] each
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotary_embedding_backward(grad, cos, sin):  # grad [.., T, h] -> dx [.., T, h]
    """The forward is x' = R x with R a rotation, so dx = R^T grad; R^T = R^-1 is the rotation by the negative angle:

        da = cos da' + sin db',    db = cos db' - sin da'"""
    return rotary_embedding(grad, cos, -sin)


def attention_weights(q, k):  # q [B, K, G, T, h], k [B, K, 1, S, h] -> [B, K, G, T, S]
    """P_ts = softmax over s of the scores q_t . k_s / sqrt(h). Query t stands at position S - T + t and attends to the
    keys up to it."""
    T, S = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])               # [B, K, G, T, S]
    is_future = np.arange(S)[None, :] > np.arange(S - T, S)[:, None]           # [T, S]
    return softmax(np.where(is_future, -np.inf, scores))                       # exp(-inf) = 0: no weight on the future


def grouped_query_attention(q, k, v):  # q [B, H, T, h], k and v [B, K, S, h] -> [B, H, T, h]
    """out_t = sum_s P_ts v_s, causal, with the attention weights P. The queries are the last T of the S positions.
    Query head i reads key/value head i // G, G = H / K. With the axis H split into [K, G], that is the first index."""
    B, H, T, h = q.shape
    K = k.shape[1]
    assert H % K == 0 and T <= k.shape[2]
    q = q.reshape(B, K, H // K, T, h)                                          # [B, K, G, T, h]
    k, v = k[:, :, None], v[:, :, None]                                        # [B, K, 1, S, h]
    return (attention_weights(q, k) @ v).reshape(B, H, T, h)


def grouped_query_attention_backward(grad, q, k, v):  # grad, q [B, H, T, h], k and v [B, K, S, h] -> dq, dk, dv
    """With A = q k^T / sqrt(h), P = softmax(A), out = P v, for one head:

        out_t = sum_s P_ts v_s        =>  dv_s  = sum_t P_ts grad_t,     dP_ts = grad_t . v_s
        P_s = e^A_s / sum_u e^A_u     =>  dP_s/dA_u = P_s ([s = u] - P_u)
                                      =>  dA_u = sum_s dP_s P_s ([s = u] - P_u) = P_u (dP_u - sum_s P_s dP_s)
        A_ts = q_t . k_s / sqrt(h)    =>  dq_t = sum_s dA_ts k_s / sqrt(h),     dk_s = sum_t dA_ts q_t / sqrt(h)

    Masked positions have P = 0, so dA = 0 there by itself. A key/value head gets the sum over the G query heads that
    read it."""
    B, H, T, h = q.shape
    K = k.shape[1]
    q, grad = (a.reshape(B, K, H // K, T, h) for a in (q, grad))               # [B, K, G, T, h]
    k, v = k[:, :, None], v[:, :, None]                                        # [B, K, 1, S, h]
    P = attention_weights(q, k)                                                # [B, K, G, T, S]
    dv = (np.swapaxes(P, -1, -2) @ grad).sum(axis=2)                           # [B, K, G, S, h] -> [B, K, S, h]
    dP = grad @ np.swapaxes(v, -1, -2)                                         # [B, K, G, T, S]
    dA = P * (dP - (P * dP).sum(axis=-1, keepdims=True)) / math.sqrt(h)        # [B, K, G, T, S]
    dq = (dA @ k).reshape(B, H, T, h)                                          # [B, H, T, h]
    dk = (np.swapaxes(dA, -1, -2) @ q).sum(axis=2)                             # [B, K, G, S, h] -> [B, K, S, h]
    return dq, dk, dv


def swiglu(gate, up):  # gate [.., I], up [.., I] -> [.., I]
    """silu(gate) * up  with  silu(g) = g sigma(g): an up-projection that a soft switch lets through."""
    return gate * sigmoid(gate) * up


def swiglu_backward(grad, gate, up):  # grad, gate, up [.., I] -> dgate [.., I], dup [.., I]
    """sigma' = sigma (1 - sigma), so silu'(g) = sigma + g sigma (1 - sigma) = sigma (1 + g (1 - sigma)), and

        dgate = grad * up * silu'(gate),    dup = grad * silu(gate)"""
    s = sigmoid(gate)
    return grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s


def cross_entropy(logits, labels):  # logits [N, V], labels [N] -> the sum (not the mean) over all targets
    """loss_n = -log softmax(z_n)[label_n] = log sum_v exp(z_nv) - z_n,label. Labels of -100 are no targets."""
    rows = np.flatnonzero(labels != IGNORE_INDEX)                              # [targets]
    z = logits[rows]                                                           # [targets, V]
    largest = z.max(axis=-1, keepdims=True)                                    # [targets, 1]
    log_sum = largest[:, 0] + np.log(np.exp(z - largest).sum(axis=-1))         # [targets]
    return float(np.sum(log_sum - z[np.arange(len(rows)), labels[rows]]))


def cross_entropy_backward(logits, labels):  # logits [N, V], labels [N] -> dlogits [N, V] of the summed loss
    """d/dz_v (log sum_u exp(z_u) - z_label) = exp(z_v) / sum_u exp(z_u) - [v = label] = softmax(z)_v - [v = label]."""
    rows = np.flatnonzero(labels != IGNORE_INDEX)
    dlogits = np.zeros(logits.shape)
    dlogits[rows] = softmax(logits[rows])
    dlogits[rows, labels[rows]] -= 1.0
    return dlogits


# ---------------------------------------------------------------------------------------------------------------------
# 2. The model. `weights` is a dict under the names of the published checkpoint; `config` has the published field names.
# A layer keeps what its backward will need in `saved`. Forward and backward are mirror images, line by line.

LAYER_WEIGHTS = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def layer_weights(weights, layer):  # -> {"input_layernorm": [D], "q_proj": [H*h, D], ..., "down_proj": [D, I]}
    return {name.split(".")[-1]: weights[f"model.layers.{layer}.{name}.weight"] for name in LAYER_WEIGHTS}


def split_heads(x, head_dim):  # [B, T, heads * h] -> [B, heads, T, h]
    B, T, _ = x.shape
    return x.reshape(B, T, -1, head_dim).swapaxes(1, 2)


def merge_heads(x):  # [B, heads, T, h] -> [B, T, heads * h]
    B, heads, T, h = x.shape
    return x.swapaxes(1, 2).reshape(B, T, heads * h)


def decoder_layer(x, w, config, cos, sin, past=None):  # x [B, T, D] -> [B, T, D], saved; past: k, v [B, K, S-T, h]
    """x += attention(norm(x));  x += mlp(norm(x)). x is the residual stream: each branch reads it and adds to it."""
    x_norm = rms_norm(x, w["input_layernorm"], config.rms_norm_eps)                        # [B, T, D]
    q = split_heads(linear(x_norm, w["q_proj"]), config.head_dim)                          # [B, H, T, h]
    k = split_heads(linear(x_norm, w["k_proj"]), config.head_dim)                          # [B, K, T, h]
    v = split_heads(linear(x_norm, w["v_proj"]), config.head_dim)                          # [B, K, T, h]
    q, k = rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)
    if past is not None:  # keys are cached after their rotation: a position never changes
        k, v = np.concatenate([past[0], k], axis=2), np.concatenate([past[1], v], axis=2)  # [B, K, S, h]
    heads = merge_heads(grouped_query_attention(q, k, v))                                  # [B, T, H*h]
    middle = x + linear(heads, w["o_proj"])                                                # [B, T, D]

    middle_norm = rms_norm(middle, w["post_attention_layernorm"], config.rms_norm_eps)     # [B, T, D]
    gate = linear(middle_norm, w["gate_proj"])                                             # [B, T, I]
    up = linear(middle_norm, w["up_proj"])                                                 # [B, T, I]
    hidden = swiglu(gate, up)                                                              # [B, T, I]
    saved = dict(x=x, x_norm=x_norm, q=q, k=k, v=v, heads=heads,
                 middle=middle, middle_norm=middle_norm, gate=gate, up=up, hidden=hidden)
    return middle + linear(hidden, w["down_proj"]), saved


def decoder_layer_backward(grad, saved, w, config, cos, sin):  # grad [B, T, D] -> dx [B, T, D], {name: gradient}
    """The forward's lines in reverse. A value that was used twice (x, x_norm, middle, ..) adds up both gradients. In
    particular, the residual stream passes `grad` on unchanged, and the gradient through the branch is added to it."""
    s, g = saved, {}
    dhidden, g["down_proj"] = linear_backward(grad, s["hidden"], w["down_proj"])           # [B, T, I]
    dgate, dup = swiglu_backward(dhidden, s["gate"], s["up"])                              # [B, T, I]
    from_gate, g["gate_proj"] = linear_backward(dgate, s["middle_norm"], w["gate_proj"])   # [B, T, D]
    from_up, g["up_proj"] = linear_backward(dup, s["middle_norm"], w["up_proj"])           # [B, T, D]
    from_mlp, g["post_attention_layernorm"] = rms_norm_backward(
        from_gate + from_up, s["middle"], w["post_attention_layernorm"], config.rms_norm_eps)
    dmiddle = grad + from_mlp                                                              # [B, T, D]

    dheads, g["o_proj"] = linear_backward(dmiddle, s["heads"], w["o_proj"])                # [B, T, H*h]
    dq, dk, dv = grouped_query_attention_backward(split_heads(dheads, config.head_dim), s["q"], s["k"], s["v"])
    dq, dk = rotary_embedding_backward(dq, cos, sin), rotary_embedding_backward(dk, cos, sin)
    from_q, g["q_proj"] = linear_backward(merge_heads(dq), s["x_norm"], w["q_proj"])       # [B, T, D]
    from_k, g["k_proj"] = linear_backward(merge_heads(dk), s["x_norm"], w["k_proj"])       # [B, T, D]
    from_v, g["v_proj"] = linear_backward(merge_heads(dv), s["x_norm"], w["v_proj"])       # [B, T, D]
    from_attention, g["input_layernorm"] = rms_norm_backward(
        from_q + from_k + from_v, s["x"], w["input_layernorm"], config.rms_norm_eps)
    return dmiddle + from_attention, g


def danube3(input_ids, weights, config, cache=None):  # input_ids [B, T] -> logits [B, T, V]
    """Embedding, num_hidden_layers decoder layers, norm, head.

    cache: None, or a list that is empty (or all None) at first and afterwards holds one (k, v) per layer, each
    [B, K, S, h]. It is extended in place. The new tokens then stand at the positions after the cached ones."""
    if cache is not None and not cache:
        cache.extend([None] * config.num_hidden_layers)
    start = cache[0][0].shape[2] if cache and cache[0] is not None else 0
    positions = np.arange(start, start + input_ids.shape[1])                               # [T]
    cos, sin = rotary_table(positions, config.head_dim, config.rope_theta)                 # [T, h/2]
    x = embedding(input_ids, weights["model.embed_tokens.weight"])                         # [B, T, D]
    for layer in range(config.num_hidden_layers):
        past = cache[layer] if cache else None
        x, saved = decoder_layer(x, layer_weights(weights, layer), config, cos, sin, past)
        if cache:
            cache[layer] = (saved["k"], saved["v"])
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)                     # [B, T, D]
    return linear(x, weights["lm_head.weight"])                                            # [B, T, V]


def next_token_labels(labels):  # [B, T] -> [B * T]
    """Labels line up with input_ids. The logits at t predict labels[t + 1], and the last ones predict nothing."""
    nothing = np.full_like(labels[:, :1], IGNORE_INDEX)
    return np.concatenate([labels[:, 1:], nothing], axis=1).reshape(-1)


def danube3_loss_and_gradients(input_ids, labels, weights, config):  # both [B, T] -> loss, count, {name: gradient}
    """The summed loss, the number of targets, and the gradients of the SUM: sums over micro-batches simply add, and one
    division by the total count makes the mean over the whole optimizer step."""
    cos, sin = rotary_table(np.arange(input_ids.shape[1]), config.head_dim, config.rope_theta)
    x = embedding(input_ids, weights["model.embed_tokens.weight"])                         # [B, T, D]
    tape = []
    for layer in range(config.num_hidden_layers):
        x, saved = decoder_layer(x, layer_weights(weights, layer), config, cos, sin)
        tape.append(saved)
    x_norm = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)                # [B, T, D]
    logits = linear(x_norm, weights["lm_head.weight"])                                     # [B, T, V]
    rows, targets = logits.reshape(-1, logits.shape[-1]), next_token_labels(labels)        # [N, V], [N]
    loss, count = cross_entropy(rows, targets), int(np.sum(targets != IGNORE_INDEX))

    grads = {}
    dlogits = cross_entropy_backward(rows, targets).reshape(logits.shape)                  # [B, T, V]
    dx, grads["lm_head.weight"] = linear_backward(dlogits, x_norm, weights["lm_head.weight"])
    dx, grads["model.norm.weight"] = rms_norm_backward(dx, x, weights["model.norm.weight"], config.rms_norm_eps)
    for layer in reversed(range(config.num_hidden_layers)):
        dx, g = decoder_layer_backward(dx, tape[layer], layer_weights(weights, layer), config, cos, sin)
        for name in LAYER_WEIGHTS:
            grads[f"model.layers.{layer}.{name}.weight"] = g[name.split(".")[-1]]
    vocab_size = weights["model.embed_tokens.weight"].shape[0]
    grads["model.embed_tokens.weight"] = embedding_backward(dx, input_ids, vocab_size)     # [V, D]
    return loss, count, grads


# ---------------------------------------------------------------------------------------------------------------------
# 3. Sampling.

def next_token_probabilities(logits, temperature, top_k, top_p):  # logits [V] -> probabilities [V]
    """The distribution to draw the next token from. In this order:

        temperature  z / temperature: below 1 sharpens, above 1 flattens (0 is greedy, and the caller's case)
        top_k        keep the k largest; 0 = off; among equals the smaller id goes first
        top_p        of what is left, renormalized, keep the fewest likeliest whose total reaches p (so at least one);
                     1 = off

    What is kept is renormalized. Everything else has probability 0."""
    assert temperature > 0
    z = logits / temperature
    order = np.argsort(-z, kind="stable")                       # ids, the likeliest first
    if top_k > 0:
        order = order[:top_k]
    p = softmax(z[order])
    if top_p < 1.0:
        needed = 1 + int(np.sum(np.cumsum(p) < top_p))          # those short of p, and the one that reaches it
        order, p = order[:needed], p[:needed]
    probabilities = np.zeros(len(logits))
    probabilities[order] = p / p.sum()
    return probabilities


def generate(input_ids, weights, config, max_new_tokens, use_cache):  # input_ids [B, T] -> [B, T + n]
    """Greedy: append the likeliest token, max_new_tokens times or until every sequence has ended. A sequence that has
    ended repeats eos_token_id. With a cache only the newest token is computed, without it the whole sequence again."""
    cache = [] if use_cache else None
    new_ids, ended = input_ids, np.zeros(len(input_ids), dtype=bool)           # [B, T], [B]
    for _ in range(max_new_tokens):
        logits = danube3(new_ids if use_cache else input_ids, weights, config, cache)[:, -1]   # [B, V]
        likeliest = np.where(ended, config.eos_token_id, logits.argmax(axis=-1))               # [B]
        new_ids = likeliest[:, None]                                                           # [B, 1]
        input_ids = np.concatenate([input_ids, new_ids], axis=1)                               # [B, T + 1]
        ended = likeliest == config.eos_token_id  # stays true: it is repeated
        if ended.all():
            break
    return input_ids


# ---------------------------------------------------------------------------------------------------------------------
# 4. Optimizer and schedule.

def adamw_step(weight, grad, m, v, step, lr, beta1, beta2, eps, weight_decay):  # all [..] -> weight, m, v
    """One AdamW update; step counts from 1.

        m = beta1 m + (1 - beta1) grad          running mean of the gradient
        v = beta2 v + (1 - beta2) grad^2        running mean of its square
        weight = weight (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    m and v, the moments, start at 0. So after t steps the factors of the gradients in them sum to 1 - beta^t only, and
    the divisions correct that. Weight decay is decoupled: it is no part of grad, so v does not rescale it."""
    m = beta1 * m + (1.0 - beta1) * grad
    v = beta2 * v + (1.0 - beta2) * grad**2
    m_hat = m / (1.0 - beta1**step)
    v_hat = v / (1.0 - beta2**step)
    weight = weight * (1.0 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return weight, m, v


def clip_gradients(grads, max_norm):  # {name: [..]} -> {name: [..]}, norm
    """All gradients as one long vector: if its norm is larger than max_norm, scale it down to (all but) max_norm.
    Returns the norm before clipping. The 1e-6 is PyTorch's guard against a division by zero."""
    norm = math.sqrt(sum(float(np.sum(grad**2)) for grad in grads.values()))
    scale = min(1.0, max_norm / (norm + 1e-6))
    return {name: grad * scale for name, grad in grads.items()}, norm


def learning_rate(step, total_steps, warmup_steps, peak, minimum):  # step 0 .. total_steps - 1 -> float
    """Linear warm-up, peak * (step + 1) / warmup_steps, so that step 0 already moves. Then half a cosine, from peak (at
    step warmup_steps) down to minimum (at step total_steps - 1, and after it)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))  # 0 .. 1
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# 5. The staged mixture: which source each sequence of a stage comes from.

def mixture_pattern(weights, length):  # {source: integer weight} -> [length] source names
    """Distribute sequences so that after every t of them source i has had its share t w_i / W to within one, W = sum of
    w. Nothing is random: of the released sources, the one with the earliest deadline is next, in exact integers. A
    source that has had n sequences

        is released at sequence t    if n + 1 stays below t w_i / W + 1:         t w_i > n W
        has its deadline at          the first t at which n would be a whole sequence short, t w_i / W >= n + 1:
                                                                                 t = (n + 1) W / w_i, rounded up

    (equal deadlines: the order of the dict). Some source is always released, because sum_i t w_i = t W is greater than
    sum_i n_i W = (t - 1) W. Tijdeman's theorem on the chairman assignment problem (1980; schedulers know it as Pfair)
    says that all deadlines can be met. Earliest deadline first meets them if any order can."""
    W = sum(weights.values())
    had = {name: 0 for name in weights}
    names = []
    for t in range(1, length + 1):
        released = [name for name in weights if t * weights[name] > had[name] * W]  # a weight of 0 is never released
        name = min(released, key=lambda i: -(-(had[i] + 1) * W // weights[i]))      # -(-a // b) is a / b rounded up
        had[name] += 1
        names.append(name)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# 6. The training step.

def train_steps(weights, batches, config, *, total_steps, warmup_steps, peak, minimum, beta1, beta2, eps, weight_decay,
                grad_clip):  # batches[step][micro_batch] = (input_ids [B, T], labels [B, T]) -> weights, losses, norms
    """Whole optimizer steps from fresh moments, with gradient accumulation. Loss and gradients are summed over the
    micro-batches and divided once, by the targets of the whole step. (Divided by each micro-batch's own count, a target
    in a micro-batch with few of them would count for more.) Weight decay is for weight matrices, embeddings included,
    not for norm weights."""
    m = {name: np.zeros_like(weight) for name, weight in weights.items()}
    v = {name: np.zeros_like(weight) for name, weight in weights.items()}
    losses, norms = [], []
    for step, micro_batches in enumerate(batches):
        loss, count = 0.0, 0
        grads = {name: np.zeros_like(weight) for name, weight in weights.items()}
        for input_ids, labels in micro_batches:
            micro_loss, micro_count, micro_grads = danube3_loss_and_gradients(input_ids, labels, weights, config)
            loss, count = loss + micro_loss, count + micro_count
            grads = {name: grads[name] + micro_grads[name] for name in grads}
        losses.append(loss / count)
        grads, norm = clip_gradients({name: grad / count for name, grad in grads.items()}, grad_clip)
        norms.append(norm)

        lr = learning_rate(step, total_steps, warmup_steps, peak, minimum)
        updated = {}
        for name, weight in weights.items():
            decay = weight_decay if weight.ndim >= 2 else 0.0
            updated[name], m[name], v[name] = adamw_step(
                weight, grads[name], m[name], v[name], step + 1, lr, beta1, beta2, eps, decay)
        weights = updated
    return weights, losses, norms


# ---------------------------------------------------------------------------------------------------------------------
# 7. LoRA: a low-rank update of a frozen weight matrix.

def lora_linear(x, weight, lora_A, lora_B, alpha):
    """y = x W^T + (alpha / r) x lora_A^T lora_B^T.
    x [.., in], weight W [out, in], lora_A [r, in], lora_B [out, r] -> [.., out]"""
    return x @ weight.T + alpha / len(lora_A) * (x @ lora_A.T @ lora_B.T)


def lora_linear_backward(grad, x, weight, lora_A, lora_B, alpha):  # -> dx [.., in], dlora_A [r, in], dlora_B [out, r]
    """With s = alpha / r, A and B the two LoRA matrices, grad [.., out], and n over all leading dimensions,

        y_no  = sum_i W_oi x_ni + s sum_ri B_or A_ri x_ni
        dA_ri = s sum_no grad_no B_or x_ni,    dB_or = s sum_n grad_no (x A^T)_nr,    dx = grad (W + s B A)

    W is frozen and gets no gradient."""
    s, rows, grads = alpha / len(lora_A), x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dlora_A = s * (grads @ lora_B).T @ rows    # [r, in]
    dlora_B = s * grads.T @ (rows @ lora_A.T)  # [out, r]
    return grad @ (weight + s * lora_B @ lora_A), dlora_A, dlora_B


# ---------------------------------------------------------------------------------------------------------------------
# 8. Quantization. Codes and scales of weight matrices [out, in], in the precision that the formats ask for.

def round_away(x):
    """To the nearest whole number, halves away from zero."""
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


def quantize_int8(weight):
    """w = (code - 128) * scale, a scale for each group of 32 weights of a row: max|w| / 127, or 1 where that is 0.
    weight [out, in] -> codes uint8 [out, in], scales fp16 [out, in/32]. Codes are for the scale as it is stored."""
    codes, scales = np.zeros(weight.shape, np.uint8), np.ones((len(weight), weight.shape[1] // 32), np.float16)
    for i, g in np.ndindex(scales.shape):
        group = weight[i, 32 * g:32 * g + 32].astype(np.float32)
        scales[i, g] = np.float16(np.abs(group).max() / np.float32(127)) or 1
        codes[i, 32 * g:32 * g + 32] = 128 + np.clip(round_away(group / np.float32(scales[i, g])), -127, 127)
    return codes, scales


def quantize_int4(weight):
    """w = (code - 8) * scale, codes 0 .. 15, a scale for each group of 32 weights of a row: -8 * scale is the one of
    largest magnitude. weight [out, in] -> codes uint8 [out, in], scales fp16 [out, in/32]"""
    codes, scales = np.zeros(weight.shape, np.uint8), np.ones((len(weight), weight.shape[1] // 32), np.float16)
    for i, g in np.ndindex(scales.shape):
        group = weight[i, 32 * g:32 * g + 32].astype(np.float32)
        scales[i, g] = np.float16(group[np.abs(group).argmax()] / np.float32(-8)) or 1
        codes[i, 32 * g:32 * g + 32] = np.clip(np.floor(group / np.float32(scales[i, g]) + 8.5), 0, 15)
    return codes, scales


def pack(codes, bits):
    """8 bits: a byte for each code. 4 bits: byte j is code 2j + 16 * code 2j+1. [out, in] -> [out, in bits/8]"""
    if bits == 8:
        return codes
    packed = np.zeros((len(codes), codes.shape[1] // 2), np.uint8)
    for j in range(packed.shape[1]):
        packed[:, j] = codes[:, 2 * j] + 16 * codes[:, 2 * j + 1]
    return packed


def unpack(packed, bits):
    """The inverse of pack. [out, in bits/8] -> [out, in]"""
    if bits == 8:
        return packed
    codes = np.zeros((len(packed), packed.shape[1] * 2), np.uint8)
    for j in range(packed.shape[1]):
        codes[:, 2 * j], codes[:, 2 * j + 1] = packed[:, j] % 16, packed[:, j] // 16
    return codes


def dequantize(packed, scales):
    """packed codes [out, in bits/8] and scales [out, in/32] -> float32 [out, in]"""
    bits = 8 * packed.shape[1] // (32 * scales.shape[1])
    offset = {8: 128, 4: 8}[bits]
    return (unpack(packed, bits).astype(np.float32) - offset) * np.repeat(scales.astype(np.float32), 32, axis=1)


def quantized_matmul(x, packed, scales):
    """x W^T with W dequantized. x [.., in] -> [.., out]"""
    return x @ dequantize(packed, scales).astype(np.float64).T


def group_scale(group, importance):
    """Of 12 scales fitted by least squares, the one with the smallest weighted error of a group. [32], [32] -> float"""
    largest, lowest = group[np.abs(group).argmax()], np.inf
    best = float(np.float16(largest / -8)) or 1.0
    for factor in [*np.linspace(0.8, 1.1, 6), *np.linspace(-1.2, -0.9, 6)]:
        start = float(np.float16(largest / -8 * factor)) or 1.0
        values = np.clip(np.floor(group / start + 0.5), -8, 7)  # code - 8
        total = (importance * values ** 2).sum()
        if total == 0:
            continue
        scale = float(np.float16((importance * group * values).sum() / total)) or 1.0
        error = (importance * (group - scale * values) ** 2).sum()
        if error < lowest:
            best, lowest = scale, error
    return best


def calibrate(weight, hessian, bits, sweeps=4, damping=0.05):
    """Coordinate descent on the cost e C e^T of each row, e = quantized - given weights, one number at a time. Both
    the cost's slope and its curvature along that number are taken from the whole Hessian each time.

    The start is round-to-nearest, at 4 bits with group_scale, weighted by the diagonal. `damping` times the mean of the
    diagonal is added to it first. weight [out, in], hessian [in, in] -> codes uint8 [out, in], scales [out, in/32]"""
    size, (lowest, offset) = weight.shape[1], {8: (1, 128), 4: (0, 8)}[bits]
    C = hessian + np.eye(size) * (damping * np.diag(hessian).mean() + 1e-12)
    codes, scales = quantize_int8(weight)
    values, scales = codes.astype(np.float64) - offset, scales.astype(np.float64)
    for row, w in enumerate(weight.astype(np.float64)):
        if bits == 4:
            for g in range(size // 32):
                group = w[32 * g:32 * g + 32]
                scales[row, g] = group_scale(group, np.diag(C)[32 * g:32 * g + 32])
                values[row, 32 * g:32 * g + 32] = np.clip(np.floor(group / scales[row, g] + 0.5), -8, 7)
        v, s = values[row], np.repeat(scales[row], 32)  # v: a view
        for g in sweeps * list(range(size // 32)):
            part = slice(32 * g, 32 * g + 32)
            direction = np.zeros(size)
            direction[part] = v[part]
            if direction.any():
                fitted = np.float16(s[part][0] - (v * s - w) @ C @ direction / (direction @ C @ direction))
                s[part] = float(fitted) or s[part][0]  # 0 is no scale: keep the old one
            for i in range(32 * g, 32 * g + 32):
                target = v[i] * s[i] - (v * s - w) @ C[i] / C[i, i]
                v[i] = np.clip(np.floor(target / s[i] + 0.5), lowest - offset, offset - 1)
        scales[row] = s[::32]
    return (values + offset).astype(np.uint8), scales.astype(np.float16)
