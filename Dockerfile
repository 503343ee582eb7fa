# Both stages on an NVIDIA GPU. Not built so far.
#
#     docker build --tag llamarec .
#     docker run --gpus all --interactive --tty \
#         --volume "$PWD/data:/llamarec/data" --volume "$PWD/experiments:/llamarec/experiments" \
#         --volume "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#         llamarec python train_retriever.py --dataset_code games
FROM python:3.11-slim
WORKDIR /llamarec
COPY requirements.lock .
# torch from the package index brings CUDA; the host has the driver.
RUN pip install --no-cache-dir torch==2.13.0 \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock
COPY . .
CMD ["python", "train_retriever.py", "--help"]
