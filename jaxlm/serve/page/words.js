"use strict";
const WORDS = {
  en: {
    model: "Model", second: "Beside it", none: "none", new: "New conversation",
    talk: "Conversation", settings: "Settings", preset: "Preset", draft: "Drafting", code: "Code",
    system: "System prompt", temperature: "Temperature", top_p: "Top p",
    top_k: "Top k (0: all)", max_tokens: "Max tokens", seed: "Seed (empty: any)",
    token: "Server's token", shown: "Show token probabilities", ask: "Your message",
    send: "Send", stop: "Stop", you: "You", edit: "Edit", again: "Regenerate",
    language: "日本語", writing: "Answering …", done: "The answer is complete.",
    stopped: "Stopped.", failed: "No answer.", answer: "Answer; arrow keys move between tokens",
  },
  ja: {
    model: "モデル", second: "比較", none: "なし", new: "新しい会話",
    talk: "会話", settings: "設定", preset: "用途", draft: "下書き", code: "コード",
    system: "システムプロンプト", temperature: "温度", top_p: "Top p",
    top_k: "Top k（0：すべて）", max_tokens: "最大トークン数", seed: "シード（空：任意）",
    token: "サーバーのトークン", shown: "トークンの確率を表示", ask: "メッセージ",
    send: "送信", stop: "停止", you: "あなた", edit: "編集", again: "再生成",
    language: "English", writing: "回答中…", done: "回答が完了しました。",
    stopped: "停止しました。", failed: "回答できませんでした。", answer: "回答。矢印キーでトークンを移動",
  },
};

// What a use of the page sets.
const PRESETS = {
  draft: {
    temperature: 0.7,
    en: "You draft e-mails, letters and reports. Give the draft alone, in the tone that is asked for.",
    ja: "メール、手紙、報告書の下書きを書きます。頼まれた調子で、下書きだけを答えてください。",
  },
  code: {
    temperature: 0.2,
    en: "You write and complete code. Give the code alone, without explanations.",
    ja: "コードを書き、続きを補います。説明を付けず、コードだけを答えてください。",
  },
};
