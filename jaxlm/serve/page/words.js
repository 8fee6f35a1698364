"use strict";
const WORDS = {
  en: {
    model: "Model", second: "Beside it", none: "none", new: "New conversation",
    settings: "Settings", system: "System prompt", temperature: "Temperature", top_p: "Top p",
    top_k: "Top k (0: all)", max_tokens: "Max tokens", seed: "Seed (empty: any)",
    token: "Server's token", shown: "Show token probabilities", ask: "Your message",
    send: "Send", stop: "Stop", you: "You", edit: "Edit", again: "Regenerate",
    language: "日本語", writing: "Answering …", done: "The answer is complete.",
    stopped: "Stopped.", failed: "No answer.", answer: "Answer; arrow keys move between tokens",
  },
  ja: {
    model: "モデル", second: "比較", none: "なし", new: "新しい会話",
    settings: "設定", system: "システムプロンプト", temperature: "温度", top_p: "Top p",
    top_k: "Top k（0：すべて）", max_tokens: "最大トークン数", seed: "シード（空：任意）",
    token: "サーバーのトークン", shown: "トークンの確率を表示", ask: "メッセージ",
    send: "送信", stop: "停止", you: "あなた", edit: "編集", again: "再生成",
    language: "English", writing: "回答中…", done: "回答が完了しました。",
    stopped: "停止しました。", failed: "回答できませんでした。", answer: "回答。矢印キーでトークンを移動",
  },
};
